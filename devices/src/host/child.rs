//! Processes that this one starts and that shall not outlive it.
#![expect(unsafe_code, reason = "a child is tied to its parent between fork and exec")]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Lets the kernel kill what `command` starts when the calling thread ends: the main thread, which
/// ends with the process.
pub fn end_with_us(command: &mut Command) {
    let parent = getpid();
    let tie = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Who ended before that would not have been noticed.
        if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    };
    // SAFETY: the closure makes system calls and nothing else: it neither allocates nor locks.
    unsafe { command.pre_exec(tie) };
}

#[cfg(test)]
mod test {
    use std::process::Stdio;
    use std::thread;

    use super::*;

    #[test]
    fn a_child_is_killed_when_the_thread_that_started_it_ends() {
        let start = || {
            let mut command = Command::new("sleep");
            end_with_us(command.arg("600").stdin(Stdio::null()));
            command.spawn().unwrap()
        };
        let mut child = thread::spawn(start).join().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }
}
