//! Which kernel do the emulated host and the guests run? Debian's cloud kernel as it is shipped,
//! with the modules that are needed, unpacked and in the order in which they load.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use lzma_rust2::XzReader;

use crate::archive::Archive;
use crate::cache::Cache;
use crate::packages;

/// Debian's package that depends on its newest kernel for virtual machines.
const PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel and its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// What `uname -r` says.
    pub release: String,
    /// The bzImage.
    pub image: PathBuf,
    modules: PathBuf,
}

/// A module, not compressed.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name with underscores, as `lsmod` prints it.
    pub name: String,
    /// The ELF object.
    pub content: Vec<u8>,
}

impl Kernel {
    /// Debian's cloud kernel, from the cache or from the network.
    ///
    /// # Errors
    /// When the package cannot be fetched or is not laid out as Debian's kernels are.
    pub fn fetch(cache: &Cache) -> Result<Self> {
        let tree = packages::unpacked(cache, PACKAGE)?;
        let images = fs::read_dir(tree.join("boot"))?;
        let image = images
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.to_string_lossy().contains("/vmlinuz-"))
            .with_context(|| format!("{} has no boot/vmlinuz", tree.display()))?;
        let name = image.to_string_lossy();
        let release = name.rsplit("/vmlinuz-").next().unwrap_or_default().to_owned();
        let places = ["usr/lib/modules", "lib/modules"];
        let modules = places
            .iter()
            .map(|place| tree.join(place).join(&release))
            .find(|path| path.exists())
            .with_context(|| format!("{} has no modules", tree.display()))?;
        Ok(Self { release, image: image.clone(), modules })
    }

    /// The modules `names` and all that they depend on, each after its dependencies. A name that is
    /// in none of the files is built into the kernel.
    ///
    /// # Errors
    /// When a module cannot be read.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut files = BTreeMap::new();
        find_modules(&self.modules, &mut files)?;
        let mut order = Vec::new();
        for name in names {
            append_with_dependencies(name, &files, &mut order)?;
        }
        Ok(order)
    }

    /// Puts the modules `names` into an initramfs: `modules/NAME.ko`, and `modules/order` with a
    /// line for each: its file and its `parameters`, given as (module, text).
    ///
    /// # Errors
    /// When a module cannot be read.
    pub fn install_modules(
        &self,
        archive: &mut Archive,
        names: &[&str],
        parameters: &[(&str, &str)],
    ) -> Result<()> {
        archive.folder("modules");
        let mut order = String::new();
        for module in self.load_order(names)? {
            let path = format!("modules/{}.ko", module.name);
            let parameter = parameters.iter().find(|(name, _)| *name == module.name);
            order += &format!("/{path} {}\n", parameter.map_or("", |(_, text)| text));
            archive.file(&path, &module.content);
        }
        archive.file("modules/order", order.as_bytes());
        Ok(())
    }
}

fn append_with_dependencies(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    order: &mut Vec<Module>,
) -> Result<()> {
    let Some(path) = files.get(name) else { return Ok(()) };
    if order.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let content = read_module(path)?;
    for dependency in dependencies(&content) {
        append_with_dependencies(&dependency, files, order)?;
    }
    order.push(Module { name: name.to_owned(), content });
    Ok(())
}

fn find_modules(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            find_modules(&entry.path(), files)?;
        } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    let content = fs::read(path).with_context(|| path.display().to_string())?;
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => Ok(content),
        Some("xz") => {
            let mut plain = Vec::new();
            XzReader::new(content.as_slice(), true)
                .read_to_end(&mut plain)
                .with_context(|| path.display().to_string())?;
            Ok(plain)
        }
        _ => bail!("{} is compressed in a way that is not known here", path.display()),
    }
}

/// The names after `depends=` in the module's `.modinfo`, with underscores.
fn dependencies(module: &[u8]) -> Vec<String> {
    let mut fields = module.split(|byte| *byte == 0);
    let depends = fields.find_map(|field| field.strip_prefix(b"depends="));
    let text = String::from_utf8_lossy(depends.unwrap_or_default());
    text.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_dependencies_of_a_module_are_read_from_its_modinfo() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0name=x\0";
        assert_eq!(dependencies(module), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"\x7fELF\0depends=\0name=x\0").is_empty());
    }
}
