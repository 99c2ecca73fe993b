# Beside the modules of microvm.nix, whose tree is `upstream`.
{
  lib,
  evaluate,
  guest,
  host,
  refusals,
  script,
  store,
  upstream,
  ...
}:

let
  beside =
    microvm:
    (evaluate [
      (upstream + "/nixos-modules/microvm")
      ../adapter.nix
      {
        microvm = {
          hypervisor = "nixvmm";
        }
        // microvm;
      }
    ]).config;

  microvm = {
    vcpu = 2;
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
    shares = [
      {
        tag = "data";
        source = store;
        mountPoint = "/data";
      }
    ];
  };

  config = beside microvm;
  inherit (config.microvm.declaredRunner) machine;

  # Guests of microvm.nix's modules and hypervisors, under our host module, and the other way round.
  theirs =
    hypervisor:
    (evaluate [
      (upstream + "/nixos-modules/microvm")
      {
        networking.hostName = "old";
        microvm = {
          inherit hypervisor;
          vsock.cid = 42;
          interfaces = [
            {
              type = "tap";
              id = "vm-old";
              mac = "02:00:00:00:00:01";
            }
          ];
        };
      }
    ]).config;
  settingsHere =
    config:
    (host { microvm.vms.old.evaluatedConfig = { inherit config; }; })
    .systemd.services."nixvmm@old".serviceConfig;
  settingsThere =
    config:
    (evaluate [
      (upstream + "/nixos-modules/host")
      { microvm.vms.web.evaluatedConfig = { inherit config; }; }
    ]).config.systemd.services."microvm@web";
  connected = {
    registerWithMachined = true;
    interfaces = [
      {
        type = "tap";
        id = "vm-web";
        mac = "02:00:00:00:00:01";
      }
      {
        type = "macvtap";
        id = "vm-far";
        mac = "02:00:00:00:00:02";
        macvtap.link = "eth0";
        macvtap.mode = "bridge";
      }
    ];
    devices = [
      {
        bus = "pci";
        path = "0000:01:00.0";
      }
    ];
  };

  # What kinds of values options take, those of each volume and interface among them.
  kinds =
    modules:
    lib.listToAttrs (
      map ({ name, type, ... }: lib.nameValuePair name type) (
        builtins.filter ({ name, ... }: lib.hasPrefix "microvm." name) (
          lib.optionAttrSetToDocList (evaluate modules).options
        )
      )
    );
  otherKinds =
    room:
    let
      ours = kinds [ (../. + "/${room.ours}") ];
      theirs = kinds [ (upstream + "/nixos-modules/${room.theirs}") ];
    in
    assert lib.length (lib.attrNames theirs) > room.count;
    lib.attrNames (lib.filterAttrs (name: kind: ours.${name} or "absent" != kind) theirs);

  # Every value, down to the options of each interface and share; packages by their names.
  plain =
    value:
    let
      tried = builtins.tryEval value;
    in
    if !tried.success then
      "none"
    else if lib.isDerivation value then
      value.name
    else if lib.isList value then
      map plain value
    else if lib.isAttrs value then
      lib.mapAttrs (_: plain) value
    else
      value;

  values =
    config:
    plain (
      removeAttrs config.microvm [
        "balloonMem"
        "bootDisk"
        "declaredRunner"
        "deploy"
        "hypervisor"
        "kernelParams"
        "nixvmm"
        "binScripts"
        "runner"
        "storeDisk"
        "storeDiskType"
        "vmHostPackages"
      ]
    );

  # A configuration that names the hypervisor of old, under its modules and under ours.
  old = {
    microvm = microvm // {
      hypervisor = "qemu";
    };
  };
  before =
    values
      (evaluate [
        (upstream + "/nixos-modules/microvm")
        old
      ]).config;
  after = values (guest old);
in
{
  machines.adapter = machine;

  cases = {
    "adapter: microvm.nix runs nixvmm" = {
      found = {
        inherit (config.microvm.declaredRunner) hypervisor supportsNotifySocket;
        inherit (machine) cpus nets;
        share = (lib.head machine.shares).source;
        programs = lib.attrNames config.microvm.declaredRunner.programs;
      };
      expected = {
        hypervisor = "nixvmm";
        supportsNotifySocket = true;
        cpus = 2;
        nets = [
          {
            type = "user";
            forwards = [ "tcp:2222:22" ];
            mac = "02:00:00:00:00:01";
          }
        ];
        share = store;
        programs = [
          "microvm-balloon"
          "microvm-console"
          "microvm-run"
          "microvm-shutdown"
        ];
      };
    };
    "adapter: forwarded ports are not refused, and shares are mounted by virtiofs" = {
      found = [
        (refusals config)
        config.fileSystems."/data".fsType
      ];
      expected = [
        [ ]
        "virtiofs"
      ];
    };
    "adapter: what is forwarded from the guest is warned of" = {
      found = map (config: lib.length config.warnings) [
        config
        (beside {
          inherit (microvm) interfaces;
          forwardPorts = [
            {
              from = "guest";
              host.port = 80;
              guest.port = 80;
            }
          ];
        })
      ];
      expected = [
        0
        1
      ];
    };
    "adapter: forwarded ports without a network of type user still are" = {
      found = lib.length (
        refusals (beside {
          inherit (microvm) forwardPorts;
        })
      );
      expected = 1;
    };
    "adapter: what is not followed is said" = {
      found =
        map (warning: lib.elemAt (lib.splitString " " warning) 2)
          (beside {
            inherit (connected) devices;
            user = "somebody";
          }).warnings;
      expected = [
        "microvm.user"
        "microvm.devices"
      ];
    };
    "their host: our runners tell when they are ready, and have the programs of its units" = {
      found =
        map
          (
            config:
            let
              inherit (settingsThere config) after serviceConfig;
            in
            {
              inherit (serviceConfig) Type;
              programs = lib.attrNames config.microvm.declaredRunner.programs;
              isRegistered = lib.elem "systemd-machined.service" after;
              isOwned = map (lib.flip lib.hasInfix (script config "tap-up")) [
                "microvm"
                "vm-web"
                "multi_queue"
              ];
            }
          )
          [
            (guest { microvm = connected; })
            (beside connected)
          ];
      expected = lib.genList (_: {
        Type = "notify";
        programs = [
          "macvtap-down"
          "macvtap-up"
          "microvm-balloon"
          "microvm-console"
          "microvm-run"
          "microvm-shutdown"
          "tap-down"
          "tap-up"
        ];
        isRegistered = true;
        isOwned = [
          true
          true
          true
        ];
      }) 2;
    };
    "our host: runners of microvm.nix run as its user, and tell when they are ready if they can" = {
      found =
        lib.genAttrs
          [
            "qemu"
            "cloud-hypervisor"
            "firecracker"
            "crosvm"
            "kvmtool"
            "stratovirt"
            "alioth"
          ]
          (hypervisor: {
            inherit (settingsHere (theirs hypervisor)) Type User Restart;
          });
      expected =
        let
          settings = Type: {
            inherit Type;
            User = "microvm";
            Restart = "always";
          };
        in
        {
          qemu = settings "simple";
          cloud-hypervisor = settings "notify";
          firecracker = settings "simple";
          crosvm = settings "simple";
          kvmtool = settings "simple";
          stratovirt = settings "simple";
          alioth = settings "simple";
        };
    };
    "our host: a guest of microvm.nix's modules that nixvmm runs is one of ours" = {
      found =
        removeAttrs
          (settingsHere (beside {
            inherit (connected) interfaces;
          }))
          [
            "X-RestartIfChanged"
          ];
      expected = { };
    };
    "switch: every option takes the kind of value that it took, but for three that take more" = {
      found = lib.concatMap otherKinds [
        {
          ours = "guest";
          theirs = "microvm";
          count = 100;
        }
        {
          ours = "host";
          theirs = "host";
          count = 10;
        }
      ];
      expected = [
        "microvm.firecracker.extraConfig"
        "microvm.hypervisor"
        "microvm.vms.<name>.config"
      ];
    };
    "switch: every option has the value that it had" = {
      found = lib.mapAttrs (name: value: {
        before = value;
        after = after.${name} or "absent";
      }) (lib.filterAttrs (name: value: after.${name} or "absent" != value) before);
      expected = { };
    };
    "switch: no option of microvm.nix is missing" = {
      found = lib.subtractLists (lib.attrNames after) (lib.attrNames before);
      expected = [ ];
    };
  };
}
