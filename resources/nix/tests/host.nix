# What a host's units become.
{
  lib,
  guest,
  host,
  refusals,
  pkgs,
  ...
}:

let
  web = guest {
    networking.hostName = "web";
    microvm = {
      volumes = [
        {
          image = "/srv/images/web.img";
          mountPoint = null;
          size = 1;
        }
        {
          image = "/dev/vg/web";
          mountPoint = null;
          autoCreate = false;
          size = 1;
        }
      ];
      shares = [
        {
          tag = "home";
          source = "/home/web";
          mountPoint = "/data";
        }
        {
          tag = "relative";
          source = "data";
          mountPoint = "/relative";
        }
      ];
      credentialFiles.token = "/run/secrets/token";
    };
  };

  evaluated = config: { evaluatedConfig = { inherit config; }; };

  # A runner that microvm.nix made.
  foreign = {
    networking.hostName = "old";
    system.build.toplevel = pkgs.toplevel;
    microvm = {
      shares = [ ];
      declaredRunner = pkgs.qemu_kvm // {
        passthru = { };
        hypervisor = "qemu";
        supportsNotifySocket = false;
      };
    };
  };

  config = host {
    microvm.vms = {
      web = evaluated web // {
        restartIfChanged = true;
      };
      "a.name.with.dots" = evaluated (guest { }) // {
        autostart = false;
      };
      old = evaluated foreign;
    };
  };

  service = name: config.systemd.services.${name};
  settings = name: (service name).serviceConfig;
in
{
  cases = {
    "host: guests start with it, and the names that microvm.nix gives to units lead to ours" = {
      found = {
        inherit (config.systemd.targets.nixvmm) aliases wants;
        template = (service "nixvmm@").aliases;
      };
      expected = {
        aliases = [ "microvms.target" ];
        wants = [
          "nixvmm@old.service"
          "nixvmm@web.service"
        ];
        template = [ "microvm@.service" ];
      };
    };
    "host: each guest has a user, and names that are no users have one all the same" = {
      found = lib.attrNames config.users.users;
      expected = lib.sort lib.lessThan [
        "microvm"
        "vm-${builtins.substring 0 16 (builtins.hashString "sha256" "a.name.with.dots")}"
        "vm-web"
      ];
    };
    "host: a guest's drop-in opens what it uses and nothing else" = {
      found = settings "nixvmm@web";
      expected = {
        X-RestartIfChanged = [
          ""
          true
        ];
        ReadWritePaths = [
          "-/srv/images"
          "-/home/web"
        ];
        DeviceAllow = [ "/dev/vg/web rw" ];
        SupplementaryGroups = [ "disk" ];
        LoadCredential = [ "token:/run/secrets/token" ];
        ProtectHome = false;
        ProcSubset = "all";
        RestrictNamespaces = false;
        SystemCallFilter = [ "@mount chroot" ];
      };
    };
    "host: a plain guest's drop-in opens nothing" = {
      found = lib.attrNames (settings "nixvmm@a.name.with.dots");
      expected = [
        "User"
        "X-RestartIfChanged"
      ];
    };
    "host: one guest's change restarts that guest alone" = {
      found = map (name: toString (lib.head (service name).restartTriggers)) [
        "nixvmm@web"
        "nixvmm@old"
      ];
      expected = [
        (toString web.microvm.declaredRunner)
        (toString foreign.microvm.declaredRunner)
      ];
    };
    "host: a guest that is no longer there stops, unless that is not wanted" = {
      found =
        let
          kept = host {
            microvm.host.stopOrphans = false;
            microvm.vms.web = evaluated web;
          };
        in
        [
          (service "nixvmm@web").unitConfig
          (service "install-microvm-web").stopIfChanged
          (service "install-microvm-web").serviceConfig.RemainAfterExit
          kept.systemd.services."nixvmm@web".unitConfig
        ];
      expected = [
        { StopPropagatedFrom = "install-microvm-web.service"; }
        false
        true
        { }
      ];
    };
    "host: what is installed and what runs are roots of the garbage collector" = {
      found = map (text: lib.hasInfix text (service "install-microvm-web").script) [
        "ln -sfn ${web.microvm.declaredRunner} current"
        "ln -sfn /var/lib/microvms/web/current /nix/var/nix/gcroots/microvm/web"
        "ln -sfn /var/lib/microvms/web/booted /nix/var/nix/gcroots/microvm/booted-web"
        "toplevel"
      ];
      expected = [
        true
        true
        true
        true
      ];
    };
    "host: a runner of microvm.nix runs as it did there" = {
      found = {
        inherit (settings "nixvmm@old")
          Type
          User
          NotifyAccess
          SystemCallFilter
          ;
        helper = (settings "nixvmm-tap@old").User;
        requires = (service "nixvmm@old").requires;
        hasFileServer = config.systemd.services ? "nixvmm-virtiofsd@";
      };
      expected = {
        Type = "simple";
        User = "microvm";
        NotifyAccess = "all";
        SystemCallFilter = "";
        helper = "root";
        requires = [
          "nixvmm-virtiofsd@%i.service"
          "nixvmm-pci@%i.service"
        ];
        hasFileServer = true;
      };
    };
    "host: a guest that machined shall know may say so, and comes after it" = {
      found =
        let
          listed =
            hostName:
            guest {
              networking = { inherit hostName; };
              microvm.registerWithMachined = true;
            };
          config = host {
            microvm.vms.web = evaluated (listed "web");
            microvm.vms.db = evaluated (listed "database");
            microvm.vms.other = evaluated (guest { });
          };
          comesAfter = name: lib.elem "systemd-machined.service" config.systemd.services.${name}.after;
        in
        {
          order = map comesAfter [
            "nixvmm@web"
            "nixvmm@other"
          ];
          rule = lib.hasInfix "create-machine" config.security.polkit.extraConfig;
          inherit (config.security.polkit) enable;
          warned = map (warning: lib.head (lib.splitString ":" warning)) config.warnings;
          without = (host { microvm.vms.other = evaluated (guest { }); }).security.polkit;
        };
      expected = {
        order = [
          true
          false
        ];
        rule = true;
        enable = true;
        warned = [ "microvm.vms.db" ];
        without = { };
      };
    };
    "host: a runner of microvm.nix registers itself by its own scripts, as root" = {
      found =
        let
          runner = foreign.microvm.declaredRunner // {
            registerWithMachined = true;
          };
          config = host {
            microvm.vms.old = evaluated (
              foreign
              // {
                microvm = foreign.microvm // {
                  declaredRunner = runner;
                };
              }
            );
          };
          old = config.systemd.services."nixvmm@old";
        in
        {
          inherit (old.serviceConfig) ExecStartPost;
          comesAfter = lib.elem "systemd-machined.service" old.after;
          # The rule is for guests of our own.
          inherit (config.security) polkit;
        };
      expected = {
        ExecStartPost = "+/var/lib/microvms/%i/booted/bin/microvm-register $MAINPID";
        comesAfter = true;
        polkit = { };
      };
    };
    "host: folders of shares are made where they are absolute" = {
      found = lib.attrNames config.systemd.tmpfiles.settings."10-microvm";
      expected = [
        "/home/web"
        "/var/lib/microvms"
      ];
    };
    "host: a time-out for starting reaches the template" = {
      found = (host { microvm.host.startupTimeout = 7; }).systemd.services."nixvmm@".serviceConfig;
      expected.TimeoutStartSec = 7;
    };
    "host: a guest may be a module of the host, with its name, or come from a flake" = {
      found =
        let
          config = host {
            microvm.vms = {
              module.config = {
                microvm.vcpu = 3;
              };
              flake = fromFlake;
              updated = fromFlake // {
                updateFlake = "github:example/guests";
              };
            };
          };
          fromFlake.flake = {
            outPath = "/etc/guests";
            nixosConfigurations = lib.genAttrs [ "flake" "updated" ] (_: {
              config = guest { };
            });
          };
          install = name: config.systemd.services."install-microvm-${name}";
          module = config.microvm.vms.module.config.config;
        in
        {
          name = module.networking.hostName;
          inherit (module.microvm.declaredRunner.machine) cpus;
          restarts = lib.mapAttrs (_: vm: vm.restartIfChanged) config.microvm.vms;
          conditions = map (name: (install name).unitConfig) [
            "module"
            "flake"
            "updated"
          ];
          flakes = map (name: lib.hasInfix "/guests > flake" (install name).script) [
            "module"
            "flake"
            "updated"
          ];
        };
      expected = {
        name = "module";
        cpus = 3;
        restarts = {
          module = true;
          flake = false;
          updated = false;
        };
        conditions = [
          { }
          { }
          { ConditionPathExists = "!/var/lib/microvms/updated/current"; }
        ];
        flakes = [
          false
          true
          true
        ];
      };
    };
    "host: a guest that is nothing is refused" = {
      found = lib.length (
        refusals (host {
          microvm.vms.nothing = { };
        })
      );
      expected = 1;
    };
    "host: it can be switched off" = {
      found = (host { microvm.host.enable = false; }).systemd.services;
      expected = { };
    };
  };
}
