# What the flake and the template put out, with a nixpkgs of stand-ins.
{
  lib,
  pkgs,
  evaluate,
  ...
}:

let
  inherit (pkgs.stdenv.hostPlatform) system;

  nixpkgs = {
    lib = lib // {
      nixosSystem = { modules, ... }: evaluate modules;
    };
    legacyPackages.${system} = pkgs;
  };

  self = (import ../../../flake.nix).outputs { inherit self nixpkgs; };

  template = (import ../template/flake.nix).outputs {
    inherit nixpkgs;
    self = template;
    nixvmm = self;
  };
  host = template.nixosConfigurations.my-host.config;
  inherit (template.nixosConfigurations.my-guest.config.microvm.declaredRunner) machine;

  # The hosts of the NixOS tests, as far as they are modules.
  hosts = lib.mapAttrs (_: { test, ... }: (evaluate [ test.nodes.host ]).config) (
    lib.filterAttrs (_: check: check ? test) self.checks.${system}
  );
  sameNames = names: lib.genAttrs names (name: name);
in
{
  cases = {
    "flake: it has the outputs that microvm.nix has" = {
      found = {
        modules = lib.attrNames self.nixosModules;
        packages = lib.attrNames self.packages.${system};
        templates = lib.attrNames self.templates;
        apps = lib.mapAttrs (_: { type, program }: [
          type
          (baseNameOf program)
        ]) self.apps.${system};
        overlay = lib.attrNames (self.overlays.default pkgs pkgs);
        formatter = self.formatter.${system}.name;
        shells = lib.attrNames self.devShells.${system};
        inherit (self.lib) hypervisors defaultFsType;
        runner = lib.functionArgs self.lib.buildRunner;
      };
      expected = {
        modules = [
          "adapter"
          "host"
          "microvm"
          "microvm-options"
        ];
        packages = [
          "default"
          "microvm"
          "nixvmm"
        ];
        templates = [
          "default"
          "microvm"
        ];
        apps = {
          default = [
            "app"
            "nixvmm"
          ];
          vm = [
            "app"
            "microvm-run"
          ];
        };
        overlay = [ "nixvmm" ];
        formatter = "nixfmt-tree";
        shells = [ "default" ];
        hypervisors = [
          "qemu"
          "cloud-hypervisor"
          "firecracker"
          "crosvm"
          "kvmtool"
          "stratovirt"
          "alioth"
          "vfkit"
          "nixvmm"
        ];
        defaultFsType = "ext4";
        runner = {
          pkgs = false;
          microvmConfig = false;
          toplevel = false;
        };
      };
    };
    "flake: the host of each NixOS test runs its guests" = {
      found = lib.mapAttrs (_: config: lib.attrNames config.microvm.vms) hosts;
      expected =
        lib.mapAttrs (_: _: [ "guest" ]) (sameNames [
          "store-closure"
          "store-on-erofs"
          "store-on-squashfs"
          "store-overlay"
          "store-share"
          "tap"
          "volume-keeps-what-a-stop-writes"
        ])
        // {
          one-guest-is-updated-and-rolled-back = [ "other" ];
          one-guest-restarts-alone = [
            "one"
            "other"
          ];
        };
    };
    "flake: each guest of a NixOS test is a machine whose unit its host installs" = {
      found = lib.all (
        config:
        lib.all (
          name:
          let
            inherit (config.microvm.vms.${name}.config.config.microvm.declaredRunner) machine;
          in
          machine.cpus == 1
          && config.systemd.services ? "nixvmm@${name}"
          && lib.hasInfix "current" config.systemd.services."install-microvm-${name}".script
        ) (lib.attrNames config.microvm.vms)
      ) (lib.attrValues hosts);
      expected = true;
    };
    "template: its guest has a network without root, and its host runs it" = {
      found = {
        inherit (machine) cpus;
        nets = map (lib.getAttrs [
          "type"
          "forwards"
        ]) machine.nets;
        program = template.packages.${system}.default.meta.mainProgram;
        inherit (host.systemd.targets.nixvmm) wants;
        users = lib.attrNames host.users.users;
        refused = builtins.filter ({ assertion, ... }: !assertion) host.assertions;
        inherit (host.microvm.vms.my-guest) restartIfChanged;
      };
      expected = {
        cpus = 2;
        nets = [
          {
            type = "user";
            forwards = [ "tcp:2222:22" ];
          }
        ];
        program = "microvm-run";
        wants = [ "nixvmm@my-guest.service" ];
        users = [
          "microvm"
          "vm-my-guest"
        ];
        refused = [ ];
        restartIfChanged = true;
      };
    };
  };
}
