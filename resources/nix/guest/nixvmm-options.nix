# Options that microvm.nix does not have.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) literalExpression mkOption types;

  cfg = config.microvm;

  option =
    type: default: description:
    mkOption { inherit type default description; };
in
{
  options.microvm = {
    nixvmm = {
      package = mkOption {
        type = types.package;
        default =
          cfg.vmHostPackages.nixvmm or (cfg.vmHostPackages.pkgsStatic.callPackage ../package.nix { });
        defaultText = literalExpression "the host's pkgs.nixvmm, or one that is built from this flake";
        description = "The package of nixvmm that runs the guest.";
      };
      buildPackage = mkOption {
        type = types.package;
        default = pkgs.buildPackages.nixvmm or cfg.nixvmm.package;
        defaultText = literalExpression "pkgs.buildPackages.nixvmm";
        description = "The package of nixvmm that unpacks the kernel when the guest is built.";
      };
      ready =
        option
          (types.enum [
            "started"
            "booted"
            "reachable"
          ])
          "booted"
          "When the guest's unit has started: when the guest runs, when all units of its boot have started or failed, or when its sshd listens; its systemd tells the last two over vsock.";
      vsock =
        option
          (types.enum [
            "kernel"
            "socket"
            "off"
          ])
          "kernel"
          "How host and guest reach each other's vsock ports: through the host's kernel (`ssh vsock/CID`), through the unix socket notify.vsock in the guest's folder, or not at all.";
      watchdog = option (types.enum [
        "off"
        "reset"
        "exit"
      ]) "off" "Whether the guest has a watchdog, and what its expiry does.";
      onReboot =
        option
          (types.enum [
            "restart"
            "exit"
          ])
          "restart"
          "What a reboot by the guest does: the same process starts it again, or its unit does, with the runner that is current then.";
      unpackKernel = mkOption {
        type = types.bool;
        default = pkgs.stdenv.hostPlatform.isx86_64;
        defaultText = literalExpression "pkgs.stdenv.hostPlatform.isx86_64";
        description = "Whether the kernel is unpacked when the guest is built, so that no start has to.";
      };
      store =
        option
          (types.enum [
            "virtiofsd"
            "whole"
            "closure"
          ])
          "virtiofsd"
          "Who serves a share whose source is /nix/store, and what of it: virtiofsd all of it, nixvmm itself all of it, or nixvmm only the guest's closure.";
      storeClosure =
        option (types.nullOr types.str) null
          "The file that lists the store paths that the guest sees, for `store = \"closure\"`.";
      storeDiskSerial =
        option types.str "nix-store"
          "The serial by which the guest finds its store image.";
      extraArgs = option (types.listOf types.str) [ ] "Further arguments of nixvmm.";
      extraConfig = mkOption {
        type = import ../lib/json-type.nix { inherit lib; };
        default = { };
        example = {
          memory.prealloc = true;
        };
        description = "Keys of the machine's JSON, over those that the other options give.";
      };
    };
  };
}
