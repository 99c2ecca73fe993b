{
  description = "nixvmm: a virtual machine monitor for lightweight NixOS guests";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      inherit (nixpkgs) lib;

      systems = [ "x86_64-linux" ];
      forEachSystem = outputs: lib.genAttrs systems (system: outputs nixpkgs.legacyPackages.${system});
      own = pkgs: self.packages.${pkgs.stdenv.hostPlatform.system};

      program = package: name: {
        type = "app";
        program = lib.getExe' package name;
      };
    in
    {
      # What microvm.nix calls by these names, and `adapter`, which is for use beside its modules.
      nixosModules = {
        microvm = ./resources/nix/guest;
        microvm-options = ./resources/nix/guest/options.nix;
        host = {
          imports = [ ./resources/nix/host ];
          nixpkgs.overlays = [ self.overlays.default ];
        };
        adapter = ./resources/nix/adapter.nix;
      };

      lib = import ./resources/nix/lib { inherit lib; };

      overlays.default = import ./resources/nix/overlay.nix;

      templates = {
        default = self.templates.microvm;
        microvm = {
          path = ./resources/nix/template;
          description = "A host with one guest";
        };
      };

      packages = forEachSystem (pkgs: rec {
        nixvmm = pkgs.pkgsStatic.callPackage ./resources/nix/package.nix { };
        microvm = nixvmm;
        default = nixvmm;
      });

      apps = forEachSystem (pkgs: {
        default = program (own pkgs).nixvmm "nixvmm";
        # A guest on this terminal; Ctrl-A x leaves it.
        vm = program (import ./resources/nix/example.nix { inherit nixpkgs pkgs self; }) "microvm-run";
      });

      # The guest tests in an emulated host are `cargo test` (see README.md).
      checks = forEachSystem (
        pkgs:
        {
          package = (own pkgs).nixvmm;
          unit = pkgs.callPackage ./resources/nix/unit-tests.nix { };
          evaluation = pkgs.callPackage ./resources/nix/tests/check.nix { };
        }
        // import ./resources/nix/checks { inherit nixpkgs pkgs self; }
      );

      devShells = forEachSystem (pkgs: {
        default = pkgs.callPackage ./resources/nix/shell.nix { };
      });

      formatter = forEachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
