# Options of other hypervisors, which evaluate and are not followed.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) literalExpression mkOption types;
  inherit (types)
    attrs
    attrsOf
    bool
    enum
    int
    ints
    listOf
    nullOr
    oneOf
    str
    ;

  cfg = config.microvm;

  option =
    type: default: description:
    mkOption { inherit type default description; };

  words = name: option (listOf str) [ ] "Further arguments of ${name}.";

  # Not evaluated unless somebody uses it: the package need not exist.
  package =
    name:
    mkOption {
      type = types.package;
      default = cfg.vmHostPackages.${name};
      defaultText = literalExpression "config.microvm.vmHostPackages.${name}";
      description = "The package of ${name}.";
    };

  json = import ../lib/json-type.nix { inherit lib; };
in
{
  options.microvm = {
    graphics = {
      enable = option bool false "Whether the guest has a display, which nixvmm does not offer.";
      backend = option (enum [
        "gtk"
        "cocoa"
        "headless"
      ]) (if pkgs.stdenv.hostPlatform.isDarwin then "cocoa" else "gtk") "Where qemu shows it.";
      socket = option str "${
        config.networking.hostName or "$HOSTNAME"
      }-gpu.sock" "The socket of a graphics process.";
      crosvmPackage = package "crosvm";
      vulkan = option (nullOr (enum [
        "venus"
        "drm_native_context"
      ])) null "How qemu passes Vulkan through.";
      hostmem = option str "256M" "The size of qemu's window for graphics memory.";
    };

    qemu = {
      machine = mkOption {
        type = str;
        default = if pkgs.stdenv.hostPlatform.isx86_64 then "microvm" else "virt";
        defaultText = literalExpression ''"microvm" on x86_64, "virt" elsewhere'';
        description = "The machine that qemu emulates.";
      };
      machineOpts = option (nullOr (attrsOf str)) null "Properties of that machine.";
      extraArgs = words "qemu";
      serialConsole = option bool true "Whether qemu emulates a serial console.";
      pcieRootPorts = mkOption {
        default = [ ];
        description = "Root ports of qemu's PCIe bus.";
        type = listOf (
          types.submodule {
            options = {
              id = mkOption {
                type = str;
                description = "The port's name.";
              };
              bus = option (nullOr str) null "Its bus.";
              chassis = option (nullOr int) null "Its chassis.";
              slot = option (nullOr str) null "Its slot.";
              addr = option (nullOr str) null "Its address.";
            };
          }
        );
      };
      package = package "qemu_kvm";
    };

    cloud-hypervisor = {
      platformOEMStrings =
        option (listOf str) [ ]
          "OEM strings of SMBIOS, such as io.systemd.credential:NAME=VALUE. nixvmm gives them to the guest.";
      extraArgs = words "cloud-hypervisor";
      package = package "cloud-hypervisor";
    };

    crosvm = {
      extraArgs = words "crosvm";
      pivotRoot = option (nullOr str) null "The folder that crosvm shuts itself in.";
      package = package "crosvm";
    };

    firecracker = {
      cpu = option (nullOr attrs) null "Firecracker's processor template.";
      driveIoEngine = option (enum [
        "Async"
        "Sync"
      ]) "Async" "How Firecracker reads disks.";
      extraArgs = words "firecracker";
      extraConfig = option (types.submodule {
        freeformType = json;
      }) { } "Keys of Firecracker's configuration.";
      package = package "firecracker";
    };

    kvmtool.package = package "kvmtool";
    stratovirt.package = package "stratovirt";
    alioth.package = package "alioth";

    vfkit = {
      extraArgs = words "vfkit";
      logLevel = option (nullOr (enum [
        "debug"
        "info"
        "error"
      ])) "info" "What vfkit logs.";
      package = package "vfkit";
      rosetta.enable = option bool false "Whether vfkit offers Rosetta.";
      rosetta.install = option bool false "Whether vfkit installs Rosetta.";
      rosetta.ignoreIfMissing = option bool false "Whether vfkit goes on without Rosetta.";
    };

    virtiofsd = {
      inodeFileHandles = option (nullOr (enum [
        "never"
        "prefer"
        "mandatory"
      ])) "prefer" "When virtiofsd keeps handles in place of open files.";
      threadPoolSize = option (oneOf [
        str
        ints.unsigned
      ]) "`nproc`" "Threads of virtiofsd.";
      group = option (nullOr str) "kvm" "The group of virtiofsd's socket.";
      extraArgs = words "virtiofsd";
      package = package "virtiofsd";
    };
  };
}
