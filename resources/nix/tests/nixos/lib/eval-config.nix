# In the place of nixpkgs' own: a system on the stand-in for NixOS.
{
  modules,
  pkgs,
  extraModules ? [ ],
  prefix ? [ ],
  specialArgs ? { },
  ...
}:

pkgs.lib.evalModules {
  inherit prefix specialArgs;
  modules = [
    (import ../../nixos.nix {
      inherit (pkgs) lib;
      inherit pkgs;
    })
  ]
  ++ modules
  ++ extraModules;
}
