# Every option that a host has, with names, types and defaults as in microvm.nix.
{
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) literalExpression mkOption types;

  option =
    type: default: description:
    mkOption { inherit type default description; };

  hostPackages = pkgs;

  # A guest from a module: it is evaluated here, as its own system, with our guest module.
  system =
    { name, config }:
    lib.mkOptionType {
      name = "NixOS configuration";
      merge =
        _: definitions:
        import "${toString config.nixpkgs}/nixos/lib/eval-config.nix" {
          modules = [
            { networking.hostName = lib.mkDefault name; }
            ../guest
          ]
          ++ map ({ value, ... }: value) definitions;
          prefix = [
            "microvm"
            "vms"
            name
            "config"
          ];
          inherit (config) extraModules pkgs specialArgs;
          inherit ((if config.pkgs != null then config.pkgs else hostPackages).stdenv.hostPlatform) system;
        };
    };

  guest =
    { config, name, ... }:
    {
      options = {
        config = option (types.nullOr (system {
          inherit name config;
        })) null "The guest, as a NixOS module.";
        evaluatedConfig =
          option (types.nullOr types.unspecified) null
            "The guest, as a system that was evaluated elsewhere.";
        flake =
          option (types.nullOr types.path) null
            "A flake that has the guest in nixosConfigurations under this name.";
        updateFlake =
          option (types.nullOr types.str) null
            "The flake from which the guest is updated by hand later on; then the host does not update it.";
        nixpkgs = mkOption {
          type = types.path;
          default = if config.pkgs != null then config.pkgs.path else pkgs.path;
          defaultText = literalExpression "pkgs.path";
          description = "The nixpkgs that `config` is evaluated with.";
        };
        pkgs = mkOption {
          type = types.nullOr types.unspecified;
          default = pkgs;
          defaultText = literalExpression "pkgs";
          description = "The packages for `config`; null for new ones.";
        };
        specialArgs =
          option (types.attrsOf types.unspecified) { }
            "Further arguments of the modules in `config`.";
        extraModules = option (types.listOf types.deferredModule) [ ] "Further modules beside `config`.";
        autostart = option types.bool true "Whether the guest starts with the host.";
        restartIfChanged = mkOption {
          type = types.bool;
          default = config.config != null;
          defaultText = literalExpression "config != null";
          description = "Whether the guest restarts when it has changed and the host is switched.";
        };
        user = mkOption {
          type = types.str;
          default =
            if builtins.match "[A-Za-z0-9_-]{1,28}" name != null then
              "vm-${name}"
            else
              "vm-${builtins.substring 0 16 (builtins.hashString "sha256" name)}";
          defaultText = literalExpression ''"vm-" and the guest's name'';
          description = "The user that runs the guest and owns its folder.";
        };
      };
    };
in
{
  options.microvm = {
    host.enable = option types.bool true "Whether this system runs guests.";
    host.startupTimeout = option types.ints.positive 150 "Seconds that a guest may take to start.";
    host.useNotifySockets =
      option types.bool false
        "Of no effect: all guests of nixvmm tell when they are ready.";
    host.stopOrphans =
      option types.bool true
        "Whether a guest that is no longer in the configuration is stopped. Its state is kept.";

    vms = mkOption {
      type = types.attrsOf (types.submodule guest);
      default = { };
      description = "The guests that are built with this host.";
    };

    stateDir =
      option types.path "/var/lib/microvms"
        "The folder in which each guest has one of its own.";
    autostart =
      option (types.listOf types.str) [ ]
        "Guests that start with the host: those of `vms`, and others by name.";
  };
}
