//! Whatever a driver does with persistent memory, it works after a reset and the file is as it was.
#![no_main]

use std::sync::{Arc, OnceLock};

use devices::host::file_window::FileWindow;
use devices::virtio::pmem::Pmem;
use fuzz::virtio::{Step, drive};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: Vec<Step>| {
    let window = Arc::clone(window());
    drive(|home| Box::new(Pmem::new("pmem0".to_owned(), window, 3 << 40, home)), &steps);
});

fn window() -> &'static Arc<FileWindow> {
    static WINDOW: OnceLock<Arc<FileWindow>> = OnceLock::new();
    WINDOW.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("fuzz-pmem-{}", std::process::id()));
        std::fs::write(&path, vec![7; 2 << 20]).unwrap();
        let window = FileWindow::open(&path, false).unwrap();
        std::fs::remove_file(&path).unwrap();
        Arc::new(window)
    })
}
