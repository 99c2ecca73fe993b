# What is said once, at evaluation, and refused by nobody.
{ config, lib, ... }:

let
  inherit (lib) optional;
  inherit (config.networking) hostName;

  cfg = config.microvm;
  warnings =
    optional (cfg.mem < 32) "${toString cfg.mem} MiB of RAM is very little"
    ++ optional config.nix.optimise.automatic "nix.optimise.automatic does nothing good to a guest's store"
    ++ optional (lib.any ({ label, autoCreate, ... }: label != null && !autoCreate)
      cfg.volumes
    ) "a volume with a label and without autoCreate is found by the label that somebody gives it"
    ++ import ../lib/unfollowed.nix { inherit lib; } cfg;
in
{
  warnings = lib.optionals cfg.guest.enable (
    map (warning: "MicroVM ${hostName}: ${warning}") warnings
  );
}
