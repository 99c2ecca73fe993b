# What evaluates and is not followed: one sentence for each option of a guest.
{ lib }:

cfg:

let
  inherit (lib) optional;

  foreign = [
    "qemu"
    "cloud-hypervisor"
    "crosvm"
    "firecracker"
    "vfkit"
  ];

  # Those of the guest's way out.
  rules = builtins.filter ({ from, ... }: from == "guest") cfg.forwardPorts;
in
optional (cfg.cpu != null) "microvm.cpu is not followed: the guest has the host's processor"
++ optional (
  cfg.initialBalloonMem != 0
) "microvm.initialBalloonMem is not followed: use bin/microvm-balloon of its runner"
++ optional (
  cfg.user != null
) "microvm.user is not followed: the guest's unit runs it as the guest's own user"
++ optional cfg.graphics.enable "microvm.graphics is not followed: nixvmm has no display"
++ optional (cfg.devices != [ ]) "microvm.devices is not followed: nixvmm passes no devices through"
++ optional cfg.vfkit.rosetta.enable "microvm.vfkit.rosetta is not followed: it needs a Mac"
++ map (
  { guest, ... }:
  "microvm.forwardPorts: the rule for the guest's way to port ${toString guest.port} is not followed: every port of the host is at the gateway's address"
) rules
++ map (
  name:
  "microvm.${name}.extraArgs are those of another program and not followed: see microvm.nixvmm.extraConfig"
) (builtins.filter (name: cfg.${name}.extraArgs != [ ]) foreign)
