# As much of NixOS as our modules speak to: its options, as plain values, without a single package.
{ lib, pkgs }:

let
  inherit (lib) mkOption types;

  list = mkOption {
    type = types.listOf types.anything;
    default = [ ];
  };

  value =
    default:
    mkOption {
      type = types.anything;
      inherit default;
    };

  entries =
    options:
    mkOption {
      default = { };
      type = types.attrsOf (
        types.submodule {
          freeformType = types.attrsOf types.anything;
          inherit options;
        }
      );
    };
in
{
  options = {
    assertions = list;
    warnings = list;
    networking.hostName = value "guest";
    networking.hostId = value null;
    networking.useNetworkd = value false;
    documentation.enable = value true;
    hardware.ksm.enable = value false;
    boot.loader.grub.enable = value true;
    boot.loader.systemd-boot.enable = value false;
    boot.initrd.systemd.tpm2.enable = value true;
    boot.postBootCommands = value "";
    boot.swraid.enable = value true;
    environment.etc = value { };
    systemd.generators = value { };
    systemd.network.networks = value { };
    systemd.network.wait-online.enable = value true;
    systemd.settings = value { };
    systemd.sockets = value { };
    systemd.tpm2.enable = value true;
    boot.kernelParams = list;
    boot.kernelModules = list;
    boot.blacklistedKernelModules = list;
    boot.initrd.kernelModules = list;
    boot.initrd.availableKernelModules = list;
    boot.kernelPackages = value { kernel = pkgs.linux; };
    boot.initrd.systemd.enable = value false;
    services.getty.autologinUser = value null;
    services.openssh.enable = value false;
    nix.enable = value true;
    nix.package = value pkgs.nix;
    nix.optimise.automatic = value false;
    nix.settings.auto-optimise-store = value false;
    security.pam = value { };
    security.polkit = value { };
    security.wrappers = value { };
    security.virtualisation.flushL1DataCache = value null;
    system.stateVersion = value null;
    system.switch.enable = value true;
    system.build = value {
      toplevel = pkgs.toplevel;
      initialRamdisk = pkgs.initrd;
    };
    system.boot.loader.initrdFile = value "initrd";
    system.activationScripts = value { };
    systemd.packages = list;
    systemd.mounts = list;
    nixpkgs.overlays = list;
    virtualisation = value { libvirtd.enable = false; };
    fonts = value { };
    hardware.graphics.enable = value false;

    systemd.targets = value { };
    systemd.tmpfiles = value { };
    environment.systemPackages = list;
    users.users = value { };
    fileSystems = entries { options = list; };
    systemd.services = entries {
      after = list;
      before = list;
      requires = list;
      wants = list;
    };
  };

  config = {
    _module.args = { inherit pkgs; };
  };
}
