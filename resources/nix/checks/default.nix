# Guests that NixOS builds, run by units of a NixOS host, which is itself a virtual machine: it needs
# a builder with nested virtualisation.
{
  nixpkgs,
  pkgs,
  self,
}:

let
  inherit (nixpkgs) lib;

  check = checkWith { };
  checkWith =
    module: name: guests: script:
    pkgs.testers.runNixOSTest {
      name = "nixvmm-${name}";
      # The host module adds nixvmm to the packages.
      node.pkgsReadOnly = false;
      nodes.host = {
        imports = [
          self.nixosModules.host
          module
        ];
        virtualisation = {
          cores = 2;
          memorySize = 3072;
          diskSize = 8192;
          qemu.options = [ "-cpu host" ];
        };
        microvm.vms = lib.mapAttrs (_: guest: {
          config.imports = [
            guest
            { system.stateVersion = lib.trivial.release; }
          ];
        }) guests;
      };
      testScript = script;
    };

  # A guest that no host has in its configuration.
  runner =
    guest:
    (lib.nixosSystem {
      inherit (pkgs.stdenv.hostPlatform) system;
      modules = [
        self.nixosModules.microvm
        guest
        {
          networking.hostName = "one";
          nixpkgs.overlays = [ self.overlays.default ];
          system.stateVersion = lib.trivial.release;
        }
      ];
    }).config.microvm.declaredRunner;

  # The unit has started when systemd in the guest has come up.
  boots =
    name: guest:
    check name { inherit guest; } ''
      host.wait_for_unit("nixvmm@guest.service", timeout=300)
      host.succeed("systemctl stop nixvmm@guest.service")
      host.succeed("systemctl show -p Result nixvmm@guest.service | grep -q success")
    '';

  witness = {
    microvm.volumes = [
      {
        image = "witness.img";
        mountPoint = "/witness";
        size = 64;
      }
    ];
    systemd.services.witness = {
      wantedBy = [ "multi-user.target" ];
      unitConfig.RequiresMountsFor = "/witness";
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
      };
      script = "echo started >> /witness/log";
      preStop = "echo stopped >> /witness/log; sync";
    };
  };
in
{
  store-on-erofs = boots "store-on-erofs" { microvm.storeDiskType = "erofs"; };
  store-on-squashfs = boots "store-on-squashfs" { microvm.storeDiskType = "squashfs"; };

  store-overlay = boots "store-overlay" {
    microvm.writableStoreOverlay = "/nix/.rw-store";
    microvm.volumes = [
      {
        image = "store.img";
        mountPoint = "/nix/.rw-store";
        size = 512;
      }
    ];
  };

  store-share = boots "store-share" {
    microvm.shares = [
      {
        proto = "virtiofs";
        tag = "store";
        source = "/nix/store";
        mountPoint = "/nix/.ro-store";
        readOnly = true;
      }
    ];
  };

  store-closure = boots "store-closure" {
    microvm.nixvmm.store = "closure";
    microvm.shares = [
      {
        proto = "virtiofs";
        tag = "store";
        source = "/nix/store";
        mountPoint = "/nix/.ro-store";
        readOnly = true;
      }
    ];
  };

  volume-keeps-what-a-stop-writes = check "volume" { guest = witness; } ''
    for _ in range(2):
        host.systemctl("start nixvmm@guest.service")
        host.wait_for_unit("nixvmm@guest.service", timeout=300)
        host.succeed("systemctl stop nixvmm@guest.service")
    log = host.succeed("${pkgs.e2fsprogs}/bin/debugfs -R 'cat /log' /var/lib/microvms/guest/witness.img")
    assert log.split() == ["started", "stopped"] * 2, log
  '';

  one-guest-restarts-alone =
    check "restart"
      {
        one = witness;
        other = { };
      }
      ''
        host.wait_for_unit("nixvmm@one.service", timeout=300)
        host.wait_for_unit("nixvmm@other.service", timeout=300)
        before = host.succeed("systemctl show -p MainPID nixvmm@other.service")
        host.succeed("systemctl restart nixvmm@one.service")
        assert before == host.succeed("systemctl show -p MainPID nixvmm@other.service")
        host.succeed("test $(readlink /var/lib/microvms/one/booted) = $(readlink /var/lib/microvms/one/current)")
      '';

  one-guest-is-updated-and-rolled-back =
    let
      first = runner { };
      second = runner { environment.etc."second".text = ""; };
    in
    checkWith
      {
        # Its user is made, and it starts with the host when it is there.
        microvm.autostart = [ "one" ];
        virtualisation.additionalPaths = [
          first
          second
        ];
      }
      "update"
      { other = { }; }
      ''
        def booted():
            return host.succeed("readlink /var/lib/microvms/one/booted").strip()

        host.wait_for_unit("nixvmm@other.service", timeout=300)
        before = host.succeed("systemctl show -p MainPID nixvmm@other.service")
        host.succeed("nixvmm vm create one --runner ${first} --start", timeout=300)
        assert booted() == "${first}"
        # As an update leaves it.
        host.succeed("ln -sfn ${first} /var/lib/microvms/one/old")
        host.succeed("ln -sfn ${second} /var/lib/microvms/one/current")
        host.succeed("nixvmm vm restart one", timeout=300)
        assert booted() == "${second}"
        host.succeed("nixvmm vm rollback one --restart", timeout=300)
        assert booted() == "${first}"
        assert before == host.succeed("systemctl show -p MainPID nixvmm@other.service")
      '';

  tap =
    check "tap"
      {
        guest = {
          microvm.interfaces = [
            {
              type = "tap";
              id = "vm-guest";
              mac = "02:00:00:00:00:01";
            }
          ];
          systemd.network.networks."10-lan" = {
            matchConfig.MACAddress = "02:00:00:00:00:01";
            address = [ "192.0.2.2/24" ];
          };
        };
      }
      ''
        host.wait_for_unit("nixvmm@guest.service", timeout=300)
        host.succeed("ip address add 192.0.2.1/24 dev vm-guest")
        host.wait_until_succeeds("ping -c 1 192.0.2.2", timeout=60)
      '';
}
