# The guest of `nix run .#vm`.
{
  nixpkgs,
  pkgs,
  self,
}:

(nixpkgs.lib.nixosSystem {
  inherit (pkgs.stdenv.hostPlatform) system;
  modules = [
    self.nixosModules.microvm
    {
      networking.hostName = "example";
      nixpkgs.overlays = [ self.overlays.default ];
      users.users.root.password = "";
      services.getty.autologinUser = "root";
      system.stateVersion = nixpkgs.lib.trivial.release;
      microvm.nixvmm.vsock = "off";
    }
  ];
}).config.microvm.declaredRunner
