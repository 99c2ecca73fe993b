# What a guest's system becomes, what is refused and what is warned of.
{
  lib,
  guest,
  refusals,
  ...
}:

let
  volume = image: {
    inherit image;
    mountPoint = null;
    size = 1;
  };
  refused =
    microvm:
    map (lib.removePrefix "MicroVM guest: ") (
      refusals (guest {
        inherit microvm;
      })
    );
  warned = microvm: map (lib.removePrefix "MicroVM guest: ") (guest { inherit microvm; }).warnings;

  overlaid = guest {
    microvm.writableStoreOverlay = "/nix/.rw-store";
    microvm.volumes = [
      (volume "first.img")
      (volume "store.img" // { mountPoint = "/nix/.rw-store"; })
      (
        volume "labelled.img"
        // {
          mountPoint = "/labelled";
          label = "data";
        }
      )
    ];
  };

  storeShare = guest {
    microvm.shares = [
      {
        tag = "store";
        source = "/nix/store";
        mountPoint = "/nix/.ro-store";
      }
    ];
  };

  share = tag: {
    inherit tag;
    proto = "virtiofs";
    source = "/srv/${tag}";
    mountPoint = "/${tag}";
  };

  interface = {
    type = "tap";
    id = "a";
    mac = "02:00:00:00:00:01";
  };
in
{
  cases = {
    "guest: the store is found by its serial" = {
      found = (guest { }).fileSystems."/nix/store";
      expected = {
        device = "/dev/disk/by-id/virtio-nix-store";
        fsType = "erofs";
        options = [
          "ro"
          "x-systemd.after=systemd-modules-load.service"
        ];
        neededForBoot = true;
        noCheck = true;
      };
    };
    "guest: an overlay lies on the image, and its volume is there in time" = {
      found = {
        inherit (overlaid.fileSystems."/nix/store") overlay;
        lower = overlaid.fileSystems."/nix/.ro-store".device;
        upper = overlaid.fileSystems."/nix/.rw-store";
        labelled = overlaid.fileSystems."/labelled".device;
      };
      expected = {
        overlay = {
          lowerdir = [ "/nix/.ro-store" ];
          upperdir = "/nix/.rw-store/store";
          workdir = "/nix/.rw-store/work";
        };
        lower = "/dev/disk/by-id/virtio-nix-store";
        upper = {
          device = "/dev/disk/by-id/virtio-volume-1";
          fsType = "ext4";
          neededForBoot = true;
          options = [ ];
        };
        labelled = "/dev/disk/by-label/data";
      };
    };
    "guest: a shared store is mounted by virtiofs whatever its protocol, and no image is built" = {
      found = {
        share = storeShare.fileSystems."/nix/.ro-store".fsType;
        store = storeShare.fileSystems."/nix/store".device;
        inherit (storeShare.microvm) storeOnDisk systemSymlink;
        disks = storeShare.microvm.declaredRunner.machine.disks;
      };
      expected = {
        share = "virtiofs";
        store = "/nix/.ro-store";
        storeOnDisk = false;
        systemSymlink = true;
        disks = [ ];
      };
    };
    "guest: the identity is the same everywhere" = {
      found = [
        (lib.removeSuffix "\n" (guest { }).environment.etc."machine-id".text)
        (guest { }).networking.hostId
      ];
      expected =
        let
          hash = builtins.hashString "sha256" "microvm.nix:guest";
        in
        [
          (builtins.substring 0 32 hash)
          (builtins.substring 0 8 hash)
        ];
    };
    "guest: what cannot be made is refused with its name" = {
      found = map (microvm: lib.length (refused microvm)) [
        {
          volumes = [
            (volume "a")
            (volume "a")
          ];
        }
        {
          interfaces = [
            interface
            (interface // { mac = "02:00:00:00:00:02"; })
          ];
        }
        { interfaces = [ (interface // { type = "bridge"; }) ]; }
        { interfaces = [ (interface // { bridge = "br0"; }) ]; }
        { interfaces = [ (interface // { id = "a-name-too-long-"; }) ]; }
        {
          forwardPorts = [
            {
              host.port = 1;
              guest.port = 1;
            }
          ];
        }
        { cloud-hypervisor.platformOEMStrings = [ "oem_strings=[a]" ]; }
        { vsock.cid = 2; }
        {
          hotplugMem = 1;
          hotpluggedMem = 2;
        }
        { volumes = [ (volume "a" // { serial = "more-than-twenty-bytes"; }) ]; }
        {
          shares = [
            (share "a")
            (share "a" // { socket = "other.sock"; })
          ];
        }
        {
          shares = [
            (share "a" // { socket = "one.sock"; })
            (share "b" // { socket = "one.sock"; })
          ];
        }
        { shares = [ (share "a" // { socket = null; }) ]; }
        { shares = [ (share "a" // { extraArgs = [ "--translate-uid=map:0:1000:1" ]; }) ]; }
      ];
      expected = lib.genList (_: 1) 14;
    };
    "guest: forwarded ports need an interface and no particular hypervisor" = {
      found = refused {
        hypervisor = "cloud-hypervisor";
        interfaces = [ (interface // { type = "user"; }) ];
        forwardPorts = [
          {
            host.port = 1;
            guest.port = 1;
          }
        ];
      };
      expected = [ ];
    };
    "guest: who waits for sshd has one" = {
      found =
        map
          (
            ssh:
            refused {
              nixvmm.ready = "reachable";
              vsock.ssh.enable = ssh;
            }
          )
          [
            true
            false
          ];
      expected = [
        [ ]
        [ "nixvmm.ready = \"reachable\" waits for sshd: enable microvm.vsock.ssh or services.openssh" ]
      ];
    };
    "guest: a writable store that is optimised is refused" = {
      found = lib.length (
        refusals (guest {
          microvm.writableStoreOverlay = "/nix/.rw-store";
          nix.optimise.automatic = true;
        })
      );
      expected = 1;
    };
    "guest: a volume for Nix's database is there before the closure is registered" = {
      found =
        map
          (
            mountPoint:
            (guest { microvm.volumes = [ (volume "a" // { inherit mountPoint; }) ]; })
            .fileSystems.${mountPoint}.neededForBoot or false
          )
          [
            "/nix/var"
            "/nix/var/nix/db"
            "/nix/variable"
            "/var"
          ];
      expected = [
        true
        true
        false
        false
      ];
    };
    "guest: a plain one is neither refused nor warned of" = {
      found = [
        (refused { })
        (warned { })
      ];
      expected = [
        [ ]
        [ ]
      ];
    };
    "guest: what is not followed is said, not refused" = {
      found = [
        (refused {
          graphics.enable = true;
          qemu.extraArgs = [ "-snapshot" ];
          user = "somebody";
          devices = [
            {
              bus = "pci";
              path = "0000:01:00.0";
            }
          ];
        })
        (map (warning: lib.head (lib.splitString " " warning)) (warned {
          graphics.enable = true;
          qemu.extraArgs = [ "-snapshot" ];
          user = "somebody";
          mem = 16;
          devices = [
            {
              bus = "pci";
              path = "0000:01:00.0";
            }
          ];
          interfaces = [ (interface // { type = "user"; }) ];
          forwardPorts = [
            {
              from = "guest";
              host.port = 80;
              guest.port = 80;
            }
            {
              host.port = 2222;
              guest.port = 22;
            }
          ];
        }))
      ];
      expected = [
        [ ]
        [
          "16"
          "microvm.user"
          "microvm.graphics"
          "microvm.devices"
          "microvm.forwardPorts:"
          "microvm.qemu.extraArgs"
        ]
      ];
    };
  };
}
