# The store paths that a guest sees of the host's store: what its system refers to.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkDefault mkIf optional;

  cfg = config.microvm;
  closure = rootPaths: pkgs.closureInfo { inherit rootPaths; };
  system = [ config.system.build.toplevel ];
  # What the guest's Nix database learns at its start lies in the store as well.
  registration = optional (cfg.registerClosure && config.nix.enable) (closure system);
in
{
  microvm.nixvmm.storeClosure = mkIf (
    cfg.guest.enable && !cfg.storeOnDisk && cfg.nixvmm.store == "closure"
  ) (mkDefault "${closure (system ++ registration)}/store-paths");
}
