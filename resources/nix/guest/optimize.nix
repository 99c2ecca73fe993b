# Defaults for a small closure and a fast start.
{
  config,
  lib,
  options,
  ...
}:

let
  inherit (lib) mkDefault mkIf;

  cfg = config.microvm;
  hasHostStore = lib.any ({ source, ... }: source == "/nix/store") cfg.shares;
in
mkIf (cfg.guest.enable && cfg.optimize.enable) {
  documentation.enable = mkDefault false;

  boot.initrd.systemd.enable = mkDefault true;
  boot.initrd.systemd.tpm2.enable = mkDefault false;
  boot.swraid.enable = mkDefault false;
  # There is no serial port; probing four costs time.
  boot.kernelParams = [ "8250.nr_uarts=0" ];

  networking.useNetworkd = mkDefault true;
  systemd.network.wait-online.enable = mkDefault false;
  systemd.tpm2.enable = mkDefault false;

  # A guest with a store of its own is replaced, not switched.
  system = lib.optionalAttrs (options ? system && options.system ? switch) {
    switch.enable = mkIf (!(config.services.openssh.enable && hasHostStore)) (mkDefault false);
  };
}
