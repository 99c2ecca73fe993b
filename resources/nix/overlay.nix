# overlays.default: nixvmm among the packages.
final: _: {
  nixvmm = final.pkgsStatic.callPackage ./package.nix { };
}
