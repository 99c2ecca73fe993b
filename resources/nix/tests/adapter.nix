# Beside the modules of microvm.nix, whose tree is `upstream`.
{
  lib,
  evaluate,
  guest,
  refusals,
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
