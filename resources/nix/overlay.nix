# overlays.default: nixvmm among the packages.
final: prev: {
  nixvmm = final.pkgsStatic.callPackage ./package.nix { };
}
