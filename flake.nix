{
  description = "nixvmm: a virtual machine monitor for lightweight NixOS guests";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs =
    { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" ];
      forEachSystem =
        outputs: nixpkgs.lib.genAttrs systems (system: outputs nixpkgs.legacyPackages.${system});
    in
    {
      packages = forEachSystem (pkgs: rec {
        nixvmm = pkgs.pkgsStatic.callPackage ./resources/nix/package.nix { };
        default = nixvmm;
      });

      # What needs no network and no emulated host; the guest tests are `cargo test` (see README.md).
      checks = forEachSystem (pkgs: {
        package = self.packages.${pkgs.stdenv.hostPlatform.system}.nixvmm;
        unit = pkgs.callPackage ./resources/nix/unit-tests.nix { };
      });

      devShells = forEachSystem (pkgs: {
        default = pkgs.callPackage ./resources/nix/shell.nix { };
      });

      formatter = forEachSystem (pkgs: pkgs.nixfmt-tree);
    };
}
