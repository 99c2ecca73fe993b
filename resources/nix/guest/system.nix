# What every guest needs, and what none does.
{ config, lib, ... }:

let
  inherit (lib)
    mkDefault
    mkIf
    mkMerge
    optional
    ;

  cfg = config.microvm;
  inherit (config.system.build) toplevel;
in
mkMerge [
  (mkIf cfg.guest.enable {
    boot.loader.grub.enable = false;
    boot.initrd.kernelModules = [
      "virtio_pci"
      "virtio_mmio"
      "virtio_blk"
      "virtio_console"
    ]
    ++ optional (cfg.shares != [ ]) "virtiofs"
    ++ optional (cfg.writableStoreOverlay != null) "overlay";
    # vsock so that readiness can be told, pvpanic so that a panic is known to the host.
    boot.initrd.availableKernelModules = [
      "vmw_vsock_virtio_transport"
      "pvpanic_mmio"
      "pvpanic_pci"
    ]
    ++ optional (cfg.nixvmm.watchdog != "off") "wdat_wdt";
    boot.blacklistedKernelModules = [
      "rfkill"
      "intel_pstate"
    ]
    ++ optional (!cfg.graphics.enable) "drm";

    # An image contains the system: the host need not have it unpacked as well.
    microvm.kernelParams = config.boot.kernelParams ++ [
      "init=${
        if cfg.storeOnDisk then builtins.unsafeDiscardStringContext "${toplevel}" else "${toplevel}"
      }/init"
    ];

    systemd.services.nix-daemon.enable = mkDefault (cfg.writableStoreOverlay != null);
    systemd.sockets.nix-daemon.enable = mkDefault (cfg.writableStoreOverlay != null);
    systemd.services.mount-pstore.enable = false;
    systemd.services."serial-getty@hvc0".enable = mkDefault true;
    # It looks for partitions, of which there are none.
    systemd.generators.systemd-gpt-auto-generator = "/dev/null";

    environment.etc."machine-id" = mkIf (cfg.machineId != null) {
      text = lib.replaceStrings [ "-" ] [ "" ] cfg.machineId + "\n";
    };
    networking.hostId = mkIf (cfg.machineId != null) (mkDefault (builtins.substring 0 8 cfg.machineId));
  })

  (mkIf (cfg.guest.enable && cfg.nixvmm.watchdog != "off") {
    systemd.settings.Manager.RuntimeWatchdogSec = mkDefault "30s";
  })

  # sshd listens at vsock port 22 by systemd's own generator.
  (mkIf (cfg.guest.enable && cfg.vsock.ssh.enable) {
    services.openssh.enable = true;
    assertions = [
      {
        assertion = cfg.nixvmm.vsock != "off";
        message = "MicroVM ${config.networking.hostName}: microvm.vsock.ssh.enable needs microvm.nixvmm.vsock";
      }
    ];
  })
]
