# machine.json: what `nixvmm run --config` is given.
{
  lib,
  guest,
  machine,
  script,
  store,
  throws,
  ...
}:

let
  plain = guest { };

  full = guest {
    microvm = {
      hypervisor = "cloud-hypervisor";
      vcpu = 2;
      mem = 2048;
      hotplugMem = 1000;
      hotpluggedMem = 0;
      balloon = true;
      vsock.cid = 42;
      hugepageMem = false;
      cloud-hypervisor.platformOEMStrings = [ "io.systemd.credential:key=value" ];
      credentialFiles.token = "/run/secrets/token";
      interfaces = [
        {
          type = "tap";
          id = "vm-tap";
          mac = "02:00:00:00:00:01";
          tap.vhost = true;
        }
        {
          type = "bridge";
          id = "vm-bridged";
          bridge = "br0";
          mac = "02:00:00:00:00:02";
        }
        {
          type = "macvtap";
          id = "vm-mac";
          mac = "02:00:00:00:00:03";
          macvtap.link = "eth0";
          macvtap.mode = "bridge";
        }
        {
          type = "user";
          id = "vm-user";
          mac = "02:00:00:00:00:04";
        }
      ];
      forwardPorts = [
        {
          host.port = 2222;
          guest.port = 22;
        }
        {
          proto = "udp";
          host.address = "::1";
          host.port = 5353;
          guest.port = 53;
        }
        {
          from = "guest";
          host.port = 80;
          guest.port = 80;
        }
      ];
      volumes = [
        {
          image = "${store}/data.img";
          mountPoint = "/data";
          size = 64;
          direct = true;
        }
        {
          image = "${store}/named.img";
          mountPoint = null;
          size = 64;
          serial = "named";
          readOnly = true;
        }
      ];
    };
  };

  shared = guest {
    microvm.shares = [
      {
        tag = "data";
        source = store;
        mountPoint = "/data";
        readOnly = true;
        cache = "never";
      }
    ];
  };

  storeOf =
    store:
    let
      made = machine (guest {
        microvm = {
          nixvmm = { inherit store; };
          shares = [
            {
              tag = "ro-store";
              source = "/nix/store";
              mountPoint = "/nix/.ro-store";
            }
          ];
        };
      });
    in
    {
      share = made.store-share or null;
      tags = map ({ tag, ... }: tag) (made.shares or [ ]);
    };
in
{
  machines = {
    plain = machine plain;
    full = machine full;
    shared = machine shared;
  };

  cases = {
    "machine: a plain guest boots an unpacked kernel from its store image" = {
      found = machine plain;
      expected = {
        kernel = "${store}/vmlinux-6.12/vmlinux";
        initrd = "${store}/initrd/initrd";
        cmdline = "8250.nr_uarts=0 init=${store}/toplevel/init regInfo=${store}/closure-info/registration panic=-1";
        cpus = 1;
        memory = {
          size = "512M";
          mergeable = true;
        };
        disks = [
          {
            path = "${store}/microvm-store-disk.erofs";
            readonly = true;
            serial = "nix-store";
          }
        ];
        nets = [ ];
        vsock = { };
        console.kind = "stdio";
        control = "guest.sock";
        balloon.deflate-on-oom = true;
        smbios = {
          uuid = plain.microvm.machineId;
          oem-strings = [ ];
        };
        ready = "booted";
        watchdog = "off";
        on-reboot = "restart";
      };
    };
    "machine: memory that may come is added to what is there, by whole blocks" = {
      found = (machine full).memory;
      expected = {
        size = "2048M";
        max = "3072M";
      };
    };
    "machine: memory that is plugged from the start is RAM" = {
      found =
        (machine (guest {
          microvm.hotplugMem = 1024;
        })).memory;
      expected = {
        size = "1536M";
        mergeable = true;
      };
    };
    "machine: all kinds of interfaces, and forwarded ports with the network of type user" = {
      found = (machine full).nets;
      expected = [
        {
          tap = "vm-tap";
          vhost = "on";
          mac = "02:00:00:00:00:01";
        }
        {
          tap = "vm-bridged";
          mac = "02:00:00:00:00:02";
        }
        {
          type = "macvtap";
          fd = [
            3
            4
          ];
          mac = "02:00:00:00:00:03";
        }
        {
          type = "user";
          forwards = [
            "tcp:2222:22"
            "udp:[::1]:5353:53"
          ];
          mac = "02:00:00:00:00:04";
        }
      ];
    };
    "machine: volumes come after the store with serials that do not move" = {
      found = lib.tail (machine full).disks;
      expected = [
        {
          path = "${store}/data.img";
          readonly = false;
          direct = true;
          serial = "volume-0";
        }
        {
          path = "${store}/named.img";
          readonly = true;
          direct = false;
          serial = "named";
        }
      ];
    };
    "machine: thirty volumes are thirty disks" = {
      found =
        lib.length
          (machine (guest {
            microvm.volumes = lib.genList (index: {
              image = "${toString index}.img";
              mountPoint = null;
              size = 1;
            }) 30;
          })).disks;
      expected = 31;
    };
    "machine: the context id and OEM strings are passed on, secrets are not in it" = {
      found = {
        inherit (machine full) vsock;
        strings = (machine full).smbios.oem-strings;
        hasSecret = lib.hasInfix "token" (builtins.toJSON (machine full));
      };
      expected = {
        vsock.cid = 42;
        strings = [ "io.systemd.credential:key=value" ];
        hasSecret = false;
      };
    };
    "machine: vsock can be a unix socket, or off, and then the guest cannot tell that it is up" = {
      found =
        map
          (
            vsock:
            let
              made = machine (guest {
                microvm.nixvmm = { inherit vsock; };
              });
            in
            [
              (made.vsock or null)
              made.ready
            ]
          )
          [
            "socket"
            "off"
          ];
      expected = [
        [
          { socket = "notify.vsock"; }
          "booted"
        ]
        [
          null
          "started"
        ]
      ];
    };
    "machine: a share of either protocol is served by virtiofsd, of which no unit is needed" = {
      found = {
        inherit (machine shared) shares;
        programs = lib.attrNames shared.microvm.declaredRunner.programs;
      };
      expected = {
        shares = [
          {
            tag = "data";
            source = store;
            readonly = true;
            cache = "never";
            posix-acl = true;
            xattr = true;
            program = "${store}/virtiofsd/bin/virtiofsd";
            arguments = [ "--inode-file-handles=prefer" ];
          }
        ];
        programs = [
          "microvm-balloon"
          "microvm-console"
          "microvm-run"
          "microvm-shutdown"
        ];
      };
    };
    "machine: a share of the store is served by whom the option names, as a closure or whole" = {
      found = map storeOf [
        "virtiofsd"
        "whole"
        "closure"
      ];
      expected = [
        {
          share = null;
          tags = [ "ro-store" ];
        }
        {
          share.tag = "ro-store";
          tags = [ ];
        }
        {
          share = {
            tag = "ro-store";
            closure = "${store}/closure-info/store-paths";
          };
          tags = [ ];
        }
      ];
    };
    "machine: pages are merged where no other process has the memory" = {
      found = map (made: (machine made).memory.mergeable or false) [
        plain
        shared
        full
        (guest { microvm.hugepageMem = true; })
      ];
      expected = [
        true
        false
        false
        false
      ];
    };
    "machine: a key of nixvmm's own goes over what the options give" = {
      found =
        (machine (guest {
          microvm.nixvmm.extraConfig = {
            memory.prealloc = true;
            cpus = 3;
          };
        })).memory;
      expected = {
        size = "512M";
        mergeable = true;
        prealloc = true;
      };
    };
    "machine: an image that is not raw is refused" = {
      found = throws (
        machine (guest {
          microvm.volumes = [
            {
              image = "a.qcow2";
              imageType = "qcow2";
              mountPoint = null;
              size = 1;
            }
          ];
        })
      );
      expected = true;
    };
    "runner: one nixvmm is started, with layers of the instance over the machine" = {
      found = map (text: lib.hasInfix text (script full "microvm-run")) [
        "exec -a microvm@guest ${store}/nixvmm/bin/nixvmm run \"\${arguments[@]}\" \"$@\""
        "arguments=(--config ${store}/microvm-guest-machine.json)"
        "machine.d/*.json"
        "exec 4<>\"/dev/tap$(< /sys/class/net/vm-mac/ifindex)\""
        "--credential token=\"@$secret\""
        "PATH=${store}/passt/bin"
      ];
      expected = lib.genList (_: true) 6;
    };
    "runner: a stop asks for it by the control socket and waits for the end" = {
      found = map (text: lib.hasInfix text (script full "microvm-shutdown")) [
        "nixvmm ctl guest.sock power-off"
        "nixvmm ctl guest.sock events"
      ];
      expected = [
        true
        true
      ];
    };
    "runner: without a socket there is nothing to ask" = {
      found =
        let
          config = guest { microvm.socket = null; };
        in
        [
          config.microvm.declaredRunner.canShutdown
          (lib.attrNames config.microvm.declaredRunner.programs)
          ((machine config) ? control)
        ];
      expected = [
        false
        [ "microvm-run" ]
        false
      ];
    };
    "runner: host modules find what they look for" = {
      found = {
        inherit (full.microvm.declaredRunner)
          canShutdown
          hypervisor
          machineId
          registerWithMachined
          supportsNotifySocket
          tapMultiQueue
          ;
        inherit (full.microvm.declaredRunner.meta) mainProgram;
      };
      expected = {
        canShutdown = true;
        hypervisor = "nixvmm";
        inherit (full.microvm) machineId;
        registerWithMachined = false;
        supportsNotifySocket = true;
        tapMultiQueue = true;
        mainProgram = "microvm-run";
      };
    };
    "machine: machined knows it by its host name, if it shall" = {
      found =
        map
          (
            registerWithMachined:
            (machine (guest {
              microvm = { inherit registerWithMachined; };
            })).machined or null
          )
          [
            false
            true
          ];
      expected = [
        null
        { name = "guest"; }
      ];
    };
    "runner: users can add to the scripts of interfaces" = {
      found =
        let
          text =
            (guest {
              microvm = {
                inherit (full.microvm) interfaces;
                forwardPorts = [ ];
                binScripts.tap-up = lib.mkAfter "echo added";
              };
            }).microvm.binScripts.tap-up;
        in
        [
          (lib.hasPrefix "set -euo pipefail" text)
          (lib.hasSuffix "echo added" (lib.removeSuffix "\n" text))
          (lib.hasInfix "tuntap add name vm-tap mode tap user \"$owner\" vnet_hdr multi_queue" text)
          (lib.hasInfix "master br0" text)
        ];
      expected = [
        true
        true
        true
        true
      ];
    };
  };
}
