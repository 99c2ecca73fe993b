//! Which system calls each kind of thread may make. Everything else ends the process.
//!
//! Both glibc and musl are covered. Calls on the way of data have no conditions on arguments, so
//! that the kernel answers them from its cache.

use super::ThreadKind;
use super::requests::*;

/// A system call, and when it is allowed: always, or when one of the conditions holds.
pub(super) struct Call {
    pub(super) number: i64,
    pub(super) when: &'static [When],
}

/// A condition on the arguments of a call.
#[derive(Clone, Copy)]
pub(super) enum When {
    /// The request of an ioctl(2).
    Request(u32),
    /// The command of an fcntl(2).
    Command(libc::c_int),
    /// Memory that cannot be executed, for mmap(2) and mprotect(2).
    NotExecutable,
    /// A signal to this process and no other, for tgkill(2).
    OwnProcess,
    /// A unix socket, for socket(2) and socketpair(2).
    UnixSocket,
    /// The name of a thread, for prctl(2).
    ThreadName,
}

/// The calls of a kind of thread, in tables that may name a call more than once.
pub(super) fn allowed(kind: ThreadKind) -> [&'static [Call]; 2] {
    let own = match kind {
        ThreadKind::Main => MAIN,
        ThreadKind::Vcpu => VCPU,
        ThreadKind::Block => BLOCK,
        ThreadKind::Net => NET,
        ThreadKind::Vsock => VSOCK,
        ThreadKind::VhostUser => VHOST_USER,
        ThreadKind::StoreServer => STORE_SERVER,
    };
    [own, EVERY_THREAD]
}

const EVERY_THREAD: &[Call] = &[
    // Eventfds, logs and files that are open.
    always(libc::SYS_read),
    always(libc::SYS_write),
    always(libc::SYS_close),
    // Event loops; other threads add and remove what a loop watches.
    always(libc::SYS_epoll_ctl),
    always(libc::SYS_epoll_wait),
    always(libc::SYS_epoll_pwait),
    // Memory allocation.
    when(libc::SYS_mmap, &[When::NotExecutable]),
    when(libc::SYS_mprotect, &[When::NotExecutable]),
    always(libc::SYS_munmap),
    always(libc::SYS_mremap),
    always(libc::SYS_madvise),
    always(libc::SYS_brk),
    // Locks, time and random seeds of hash maps.
    always(libc::SYS_futex),
    always(libc::SYS_sched_yield),
    always(libc::SYS_clock_gettime),
    always(libc::SYS_clock_nanosleep),
    always(libc::SYS_getrandom),
    // glibc's allocator asks for the number of processors.
    always(libc::SYS_sched_getaffinity),
    // Signals: returning from them, and abort().
    always(libc::SYS_restart_syscall),
    always(libc::SYS_rt_sigprocmask),
    always(libc::SYS_rt_sigreturn),
    always(libc::SYS_getpid),
    always(libc::SYS_gettid),
    when(libc::SYS_tgkill, &[When::OwnProcess]),
    // musl's pthread_kill() and raise().
    #[cfg(target_env = "musl")]
    always(libc::SYS_tkill),
    // A file that is closed is checked first, in builds with debug assertions.
    when(libc::SYS_fcntl, &[When::Command(libc::F_GETFD)]),
    // The terminal is put back from any thread that ends the process.
    when(libc::SYS_ioctl, &[When::Request(TCSETS), When::Request(TCSETS2)]),
    // The end of a thread and of the process.
    always(libc::SYS_sigaltstack),
    always(libc::SYS_exit),
    always(libc::SYS_exit_group),
];

const VCPU: &[Call] = &[
    when(
        libc::SYS_ioctl,
        &[
            When::Request(KVM_RUN),
            // Interrupts and doorbells that a driver sets up.
            When::Request(KVM_IRQFD),
            When::Request(KVM_IOEVENTFD),
            When::Request(KVM_SET_GSI_ROUTING),
            // The guest's clock is told of a pause.
            When::Request(KVM_KVMCLOCK_CTRL),
            // Where a processor was when it could not go on.
            When::Request(KVM_GET_REGS),
            // Queues and offloads of a tap, when a driver starts.
            When::Request(TUNSETOFFLOAD),
            When::Request(TUNSETQUEUE),
        ],
    ),
    // What a device needs when its driver activates it.
    always(libc::SYS_eventfd2),
    always(libc::SYS_timerfd_create),
    when(libc::SYS_fcntl, &[When::Command(libc::F_DUPFD_CLOEXEC)]),
];

const BLOCK: &[Call] = &[
    always(libc::SYS_preadv),
    always(libc::SYS_preadv2),
    always(libc::SYS_pwritev),
    always(libc::SYS_pwritev2),
    always(libc::SYS_pread64),
    always(libc::SYS_pwrite64),
    always(libc::SYS_io_uring_enter),
    always(libc::SYS_fdatasync),
    always(libc::SYS_fallocate),
    // The capacity, which may change.
    always(libc::SYS_lseek),
    when(libc::SYS_ioctl, &[When::Request(BLKDISCARD)]),
];

const NET: &[Call] = &[always(libc::SYS_readv), always(libc::SYS_writev)];

const VSOCK: &[Call] = &[
    // Data between sockets and guest memory.
    always(libc::SYS_readv),
    always(libc::SYS_writev),
    always(libc::SYS_recvfrom),
    always(libc::SYS_sendto),
    always(libc::SYS_shutdown),
    // Programs that come, and those that the guest wants: unix sockets and no others.
    always(libc::SYS_accept4),
    when(libc::SYS_socket, &[When::UnixSocket]),
    when(libc::SYS_socketpair, &[When::UnixSocket]),
    always(libc::SYS_connect),
    when(libc::SYS_ioctl, &[When::Request(FIONBIO)]),
];

const VHOST_USER: &[Call] = &[
    // Messages, and the end of a conversation.
    always(libc::SYS_sendmsg),
    always(libc::SYS_recvmsg),
    always(libc::SYS_shutdown),
    // Time is up, or it is time to look for a process that was lost.
    always(libc::SYS_timerfd_create),
    always(libc::SYS_timerfd_settime),
    // A process that is back where it was, and a child that is not.
    when(libc::SYS_socket, &[When::UnixSocket]),
    always(libc::SYS_connect),
    always(libc::SYS_wait4),
    when(libc::SYS_ioctl, &[When::Request(FIONBIO)]),
    when(libc::SYS_fcntl, &[When::Command(libc::F_DUPFD_CLOEXEC)]),
];

const STORE_SERVER: &[Call] = &[
    // Files below the store, which landlock keeps apart from others.
    always(libc::SYS_openat2),
    always(libc::SYS_statx),
    always(libc::SYS_readlinkat),
    always(libc::SYS_preadv),
    always(libc::SYS_lseek),
    always(libc::SYS_getdents64),
    // Lists of further store paths.
    always(libc::SYS_pread64),
    always(libc::SYS_fgetxattr),
    always(libc::SYS_flistxattr),
    always(libc::SYS_fstatfs),
    // The machine's messages, with the guest's memory, and their end.
    always(libc::SYS_sendmsg),
    always(libc::SYS_recvmsg),
    always(libc::SYS_sendto),
    always(libc::SYS_recvfrom),
    always(libc::SYS_shutdown),
    always(libc::SYS_fstat),
    when(libc::SYS_fcntl, &[When::Command(libc::F_DUPFD_CLOEXEC), When::Command(libc::F_GETFL)]),
    // A thread that was made last may still be at its beginning.
    when(libc::SYS_prctl, &[When::ThreadName]),
    always(libc::SYS_set_robust_list),
    always(libc::SYS_rseq),
];

const MAIN: &[Call] = &[
    // Consoles: files, terminals, sockets whose clients come and go.
    always(libc::SYS_accept4),
    always(libc::SYS_recvfrom),
    always(libc::SYS_sendto),
    always(libc::SYS_poll),
    always(libc::SYS_ppoll),
    always(libc::SYS_unlink),
    always(libc::SYS_unlinkat),
    when(libc::SYS_fcntl, &[When::Command(libc::F_DUPFD_CLOEXEC)]),
    // Calls of control clients, which may bring a file with them, and disks that they grow.
    always(libc::SYS_recvmsg),
    always(libc::SYS_ftruncate),
    // A list of store paths, which is handed on to the store's server.
    when(libc::SYS_fcntl, &[When::Command(libc::F_GET_SEALS)]),
    always(libc::SYS_sendmsg),
    // An image that such a file takes the place of.
    when(
        libc::SYS_fcntl,
        &[
            When::Command(libc::F_GETFL),
            When::Command(libc::F_SETFL),
            When::Command(libc::F_OFD_SETLK),
        ],
    ),
    when(libc::SYS_ioctl, &[When::Request(BLKSSZGET), When::Request(BLKPBSZGET)]),
    always(libc::SYS_fdatasync),
    always(libc::SYS_dup3),
    // Timers, and the signals that ask the guest to end.
    always(libc::SYS_timerfd_create),
    always(libc::SYS_timerfd_settime),
    always(libc::SYS_eventfd2),
    // A restart: RAM is emptied, the kernel is read again, KVM makes a new machine.
    always(libc::SYS_pread64),
    always(libc::SYS_lseek),
    always(libc::SYS_fstat),
    always(libc::SYS_statx),
    always(libc::SYS_newfstatat),
    always(libc::SYS_fallocate),
    when(
        libc::SYS_ioctl,
        &[
            When::Request(KVM_CHECK_EXTENSION),
            When::Request(KVM_CREATE_IRQCHIP),
            When::Request(KVM_CREATE_VCPU),
            When::Request(KVM_CREATE_VM),
            When::Request(KVM_GET_LAPIC),
            When::Request(KVM_GET_SREGS),
            When::Request(KVM_GET_SUPPORTED_CPUID),
            When::Request(KVM_GET_TSC_KHZ),
            When::Request(KVM_GET_VCPU_MMAP_SIZE),
            When::Request(KVM_IOEVENTFD),
            When::Request(KVM_IRQFD),
            When::Request(KVM_SET_CPUID2),
            When::Request(KVM_SET_GSI_ROUTING),
            When::Request(KVM_SET_IDENTITY_MAP_ADDR),
            When::Request(KVM_SET_LAPIC),
            When::Request(KVM_SET_MSRS),
            When::Request(KVM_SET_REGS),
            When::Request(KVM_SET_SREGS),
            When::Request(KVM_SET_TSS_ADDR),
            When::Request(KVM_SET_USER_MEMORY_REGION),
            When::Request(KVM_SET_XCRS),
            When::Request(TCGETS),
            When::Request(TCGETS2),
            When::Request(TIOCGPGRP),
            When::Request(TIOCGWINSZ),
            // Rings that a driver of the host's kernel takes over.
            When::Request(VHOST_NET_SET_BACKEND),
            When::Request(VHOST_SET_FEATURES),
            When::Request(VHOST_SET_MEM_TABLE),
            When::Request(VHOST_SET_VRING_ADDR),
            When::Request(VHOST_SET_VRING_BASE),
            When::Request(VHOST_SET_VRING_CALL),
            When::Request(VHOST_SET_VRING_ERR),
            When::Request(VHOST_SET_VRING_KICK),
            When::Request(VHOST_SET_VRING_NUM),
            When::Request(VHOST_VSOCK_SET_RUNNING),
            // What a driver changes by a network card's control queue.
            When::Request(TUNSETOFFLOAD),
            When::Request(TUNSETQUEUE),
        ],
    ),
];

const fn always(number: i64) -> Call {
    Call { number, when: &[] }
}

const fn when(number: i64, when: &'static [When]) -> Call {
    Call { number, when }
}
