# nixosModules.adapter: nixvmm as one more hypervisor of microvm.nix, beside its own modules and under
# its host module: `microvm.hypervisor = "nixvmm";`.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    mkForce
    mkIf
    mkOption
    types
    ;

  cfg = config.microvm;
  nixvmmLib = import ./lib { inherit lib; };
  hasUserNetwork = lib.any ({ type, ... }: type == "user") cfg.interfaces;
  isChosen = cfg.hypervisor == "nixvmm";
in
{
  imports = [ ./guest/nixvmm-options.nix ];

  # Enumerations that are declared twice take the values of both.
  options.microvm.hypervisor = mkOption { type = types.enum [ "nixvmm" ]; };

  # It insists on qemu for forwarded ports, which nixvmm has as well.
  options.assertions = mkOption {
    apply = builtins.filter (
      { message, ... }:
      !(isChosen && hasUserNetwork && lib.hasInfix "config.microvm.forwardPorts" message)
    );
  };

  config = lib.mkMerge [
    {
      microvm.runner.nixvmm = nixvmmLib.buildRunner {
        inherit pkgs;
        inherit (config.system.build) toplevel;
        microvmConfig = cfg // {
          inherit (config.networking) hostName;
          hypervisor = "nixvmm";
        };
      };
    }
    (mkIf (isChosen && cfg.guest.enable) {
      # Shares are served as virtiofs whatever they were written for.
      fileSystems = lib.listToAttrs (
        map (
          { mountPoint, ... }:
          lib.nameValuePair mountPoint {
            fsType = mkForce "virtiofs";
            options = mkForce [
              "defaults"
              "x-systemd.after=systemd-modules-load.service"
            ];
          }
        ) (builtins.filter ({ proto, ... }: proto == "9p") cfg.shares)
      );

      warnings = map (warning: "MicroVM ${config.networking.hostName}: ${warning}") (
        import ./lib/unfollowed.nix { inherit lib; } cfg
      );

      boot.initrd.systemd.enable = lib.mkOverride 900 true;
      boot.initrd.kernelModules = [ "virtio_console" ];
      boot.initrd.availableKernelModules = [
        "pvpanic_mmio"
        "pvpanic_pci"
      ];
      systemd.services."serial-getty@hvc0".enable = lib.mkDefault true;
    })
  ];
}
