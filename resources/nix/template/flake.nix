{
  description = "A host with one guest, and a guest that runs by itself";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    # Where you have nixvmm from.
    nixvmm.url = "git+file:///path/to/nixvmm";
    nixvmm.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    {
      self,
      nixpkgs,
      nixvmm,
    }:
    let
      system = "x86_64-linux";

      guest = {
        networking.hostName = "my-guest";
        users.users.root.password = "";
        system.stateVersion = "25.11";

        microvm = {
          vcpu = 2;
          mem = 512;
          # A network without root; its port 22 is the host's 2222.
          interfaces = [
            {
              type = "user";
              id = "user0";
              mac = "02:00:00:00:00:01";
            }
          ];
          forwardPorts = [
            {
              host.port = 2222;
              guest.port = 22;
            }
          ];
          volumes = [
            {
              image = "var.img";
              mountPoint = "/var";
              size = 256;
            }
          ];
        };
      };
    in
    {
      # `nix run` boots the guest on this terminal; Ctrl-A x leaves it.
      packages.${system}.default = self.nixosConfigurations.my-guest.config.microvm.declaredRunner;

      nixosConfigurations.my-guest = nixpkgs.lib.nixosSystem {
        inherit system;
        modules = [
          nixvmm.nixosModules.microvm
          guest
        ];
      };

      nixosConfigurations.my-host = nixpkgs.lib.nixosSystem {
        inherit system;
        modules = [
          nixvmm.nixosModules.host
          {
            networking.hostName = "my-host";
            fileSystems."/".device = "/dev/disk/by-label/nixos";
            boot.loader.systemd-boot.enable = true;
            system.stateVersion = "25.11";
            microvm.vms.my-guest.config = guest;
          }
        ];
      };
    };
}
