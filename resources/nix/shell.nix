# What a developer needs; the guest tests also want qemu, erofs-utils and the like.
{
  mkShell,
  cargo,
  cargo-deny,
  clippy,
  deadnix,
  rust-analyzer,
  rustc,
  rustfmt,
  busybox,
  cpio,
  e2fsprogs,
  erofs-utils,
  kmod,
  qemu,
  squashfsTools,
  virtiofsd,
}:

mkShell {
  packages = [
    cargo
    cargo-deny
    clippy
    deadnix
    rust-analyzer
    rustc
    rustfmt
    busybox
    cpio
    e2fsprogs
    erofs-utils
    kmod
    qemu
    squashfsTools
    virtiofsd
  ];
}
