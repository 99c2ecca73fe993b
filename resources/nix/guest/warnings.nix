# What evaluates and is not followed, said once, at evaluation.
{ config, lib, ... }:

let
  inherit (lib) optional;
  inherit (config.networking) hostName;

  cfg = config.microvm;
  warnings =
    optional (cfg.mem < 32) "${toString cfg.mem} MiB of RAM is very little"
    ++ optional config.nix.optimise.automatic "nix.optimise.automatic does nothing good to a guest's store"
    ++ optional (cfg.cpu != null) "microvm.cpu is not followed: the guest has the host's processor"
    ++ optional (
      cfg.initialBalloonMem != 0
    ) "microvm.initialBalloonMem is not followed: use bin/microvm-balloon of its runner"
    ++ optional (
      cfg.user != null
    ) "microvm.user is not followed: the guest's unit runs it as the guest's own user"
    ++ optional cfg.graphics.enable "microvm.graphics is not followed: nixvmm has no display"
    ++ optional (cfg.devices != [ ]) "microvm.devices is not followed: nixvmm passes no devices through"
    ++ optional cfg.vfkit.rosetta.enable "microvm.vfkit.rosetta is not followed: it needs a Mac"
    ++ optional (lib.any ({ label, autoCreate, ... }: label != null && !autoCreate)
      cfg.volumes
    ) "a volume with a label and without autoCreate is found by the label that somebody gives it"
    ++ import ../lib/unfollowed-forwards.nix cfg.forwardPorts
    ++ map (
      name:
      "microvm.${name}.extraArgs are those of another program and not followed: see microvm.nixvmm.extraConfig"
    ) (builtins.filter (name: cfg.${name}.extraArgs != [ ]) foreign);

  foreign = [
    "qemu"
    "cloud-hypervisor"
    "crosvm"
    "firecracker"
    "vfkit"
  ];
in
{
  warnings = lib.optionals cfg.guest.enable (
    map (warning: "MicroVM ${hostName}: ${warning}") warnings
  );
}
