# nixosModules.microvm: a NixOS system that nixvmm runs.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  nixvmmLib = import ../lib { inherit lib; };

  runner = nixvmmLib.buildRunner {
    inherit pkgs;
    inherit (config.system.build) toplevel;
    microvmConfig = config.microvm // {
      inherit (config.networking) hostName;
    };
  };
in
{
  imports = [
    ./options.nix
    ./assertions.nix
    ./deploy.nix
    ./interfaces.nix
    ./mounts.nix
    ./optimize.nix
    ./store-disk.nix
    ./store-share.nix
    ./system.nix
    ./warnings.nix
  ];

  # Configurations name the runner of the hypervisor that they were written for; there is one.
  config.microvm.runner = lib.genAttrs nixvmmLib.hypervisors (_: runner);
}
