# What flakes find as `lib`.
{ lib }:

{
  # Names that `microvm.hypervisor` may have. All but the last are those of microvm.nix, so that its
  # configurations evaluate; nixvmm runs the guest whichever is chosen.
  hypervisors = [
    "qemu"
    "cloud-hypervisor"
    "firecracker"
    "crosvm"
    "kvmtool"
    "stratovirt"
    "alioth"
    "vfkit"
    "nixvmm"
  ];

  # File system of a volume that names none.
  defaultFsType = "ext4";

  # { pkgs, microvmConfig, toplevel } -> the package that runs the guest.
  buildRunner = import ./runner.nix;

  # { microvmConfig, kernel } -> the machine as `nixvmm run --config` takes it.
  machine = import ./machine.nix { inherit lib; };

  # How the guest finds a volume, whatever order disks are found in.
  volumeSerial = import ./volume-serial.nix;
}
