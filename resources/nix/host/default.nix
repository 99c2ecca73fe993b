# nixosModules.host: a NixOS system that runs guests, with the units of resources/systemd.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    concatMapAttrs
    genAttrs
    mapAttrs
    mapAttrs'
    mapAttrsToList
    mkDefault
    mkIf
    mkMerge
    nameValuePair
    optional
    optionalAttrs
    ;

  cfg = config.microvm;
  inherit (cfg) stateDir;

  units = import ./units.nix { inherit lib pkgs stateDir; };
  coreutil = lib.getExe' pkgs.coreutils;

  guests = mapAttrs (
    name: vm:
    let
      system =
        if vm.flake != null then
          vm.flake.nixosConfigurations.${name}
        else if vm.evaluatedConfig != null then
          vm.evaluatedConfig
        else
          vm.config;
      guest = system.config;
      runner = guest.microvm.declaredRunner;
      # A runner of microvm.nix: another hypervisor, in which our confinement has no place.
      foreign = (runner.passthru.hypervisor or runner.hypervisor) != "nixvmm";
    in
    {
      inherit
        vm
        guest
        runner
        foreign
        ;
      user = if foreign then "microvm" else vm.user;
    }
  ) cfg.vms;

  machined = "systemd-machined.service";
  isRegistered = runner: runner.passthru.registerWithMachined or runner.registerWithMachined or false;
  registered = lib.filterAttrs (_: { runner, foreign, ... }: isRegistered runner && !foreign) guests;

  onlyByName = builtins.filter (name: !(cfg.vms ? ${name})) cfg.autostart;
  users = lib.unique (
    mapAttrsToList (_: { user, ... }: user) guests ++ map (name: "vm-${name}") onlyByName
  );

  install =
    name:
    {
      vm,
      guest,
      runner,
      user,
      ...
    }:
    nameValuePair "install-microvm-${name}" {
      description = "Installs the guest ${name}";
      before = map (unit: "${unit}@${name}.service") ([ "nixvmm" ] ++ units.helpers);
      wantedBy = [
        "nixvmm.target"
        "nixvmm@${name}.service"
      ];
      # Then the guest's own update decides, and the host's does not.
      unitConfig.ConditionPathExists = mkIf (
        vm.flake != null && vm.updateFlake != null
      ) "!${stateDir}/${name}/current";
      # Changed, it runs again and nothing stops; no longer there, it stops, and the guest with it.
      stopIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
      };
      script = ''
        mkdir -p ${stateDir}/${name} /nix/var/nix/gcroots/microvm
        cd ${stateDir}/${name}
        ln -sfn ${runner} current
        # What the guest runs is in use even when the host has a newer generation.
        ln -sfn ${stateDir}/${name}/current /nix/var/nix/gcroots/microvm/${name}
        ln -sfn ${stateDir}/${name}/booted /nix/var/nix/gcroots/microvm/booted-${name}
        ${
          if vm.flake != null then
            "echo ${
              lib.escapeShellArg (toString (if vm.updateFlake != null then vm.updateFlake else vm.flake))
            } > flake"
          else
            "ln -sfn ${guest.system.build.toplevel} toplevel"
        }
        if [ "$(stat -c %U .)" != ${user} ]; then
          chown -Rh ${user}: .
        fi
      '';
    };

  # What differs from one guest to another, over the one template.
  instance =
    name:
    {
      vm,
      guest,
      runner,
      user,
      foreign,
    }:
    nameValuePair "nixvmm@${name}" (mkMerge [
      {
        overrideStrategy = "asDropin";
        path = lib.mkForce [ ];
        serviceConfig = {
          X-RestartIfChanged = [
            ""
            vm.restartIfChanged
          ];
        }
        // optionalAttrs (user != "vm-${name}") { User = user; };
        restartTriggers = [ runner ];
        after = [ "install-microvm-${name}.service" ] ++ optional (isRegistered runner) machined;
        wants = optional (isRegistered runner) machined;
        unitConfig = optionalAttrs cfg.host.stopOrphans {
          StopPropagatedFrom = "install-microvm-${name}.service";
        };
      }
      (mkIf (foreign && isRegistered runner) units.registering)
      (if foreign then units.foreign runner else { serviceConfig = units.paths guest.microvm; })
    ]);

  # The helpers of a guest act as its user, too.
  helpers =
    name:
    {
      vm,
      user,
      foreign,
      ...
    }:
    genAttrs (map (helper: "${helper}@${name}") units.helpers) (helper: {
      overrideStrategy = "asDropin";
      path = lib.mkForce [ ];
      serviceConfig = {
        X-RestartIfChanged = [
          ""
          vm.restartIfChanged
        ];
      }
      // optionalAttrs (user != "vm-${name}") { User = user; }
      // optionalAttrs (foreign && !lib.hasPrefix "nixvmm-booted" helper) units.asRoot;
    });

  hasForeign = lib.any ({ foreign, ... }: foreign) (lib.attrValues guests);
in
{
  imports = [ ./options.nix ];

  config = mkIf cfg.host.enable {
    assertions = lib.concatLists (
      mapAttrsToList (name: vm: [
        {
          assertion = vm.config != null -> vm.flake == null && vm.updateFlake == null;
          message = "microvm.vms.${name}: a guest that is described by `config` has neither `flake` nor `updateFlake`";
        }
        {
          assertion = vm.config != null || vm.flake != null || vm.evaluatedConfig != null;
          message = "microvm.vms.${name}: say what it is, by `config`, `flake` or `evaluatedConfig`";
        }
      ]) cfg.vms
    );

    warnings = mapAttrsToList (
      name:
      { guest, user, ... }:
      "microvm.vms.${name}: machined is to know it as ${guest.networking.hostName}, and its user ${user} may register vm-NAME as NAME only: let networking.hostName be its name"
    ) (lib.filterAttrs (_: { guest, user, ... }: user != "vm-${guest.networking.hostName}") registered);

    # Who runs a guest has no rights of root, and machined asks polkit.
    security.polkit = mkIf (registered != { }) {
      enable = mkDefault true;
      extraConfig = builtins.readFile ../../systemd/nixvmm-machined.rules;
    };

    boot.kernelModules = [
      "tap"
      "vhost_net"
      "vhost_vsock"
    ];
    hardware.ksm.enable = mkDefault true;

    users.users =
      genAttrs users (_: {
        isSystemUser = true;
        group = mkDefault "kvm";
      })
      // {
        # Images and shares of configurations for microvm.nix name it as their owner.
        microvm = {
          isSystemUser = true;
          group = mkDefault "kvm";
        };
      };

    systemd.tmpfiles.settings."10-microvm" = {
      ${stateDir}.d = {
        user = "root";
        group = "kvm";
        mode = "0755";
      };
    }
    // concatMapAttrs (
      _:
      { guest, user, ... }:
      lib.listToAttrs (
        map
          (
            { source, ... }:
            nameValuePair source {
              # Only where it is made; what exists stays as it is.
              d = {
                user = ":${user}";
                group = ":kvm";
                mode = ":0775";
              };
            }
          )
          (
            builtins.filter (
              { source, ... }: lib.hasPrefix "/" source && source != "/nix/store"
            ) guest.microvm.shares
          )
      )
    ) guests;

    systemd.packages = [ units.package ];
    systemd.services = mkMerge [
      (mapAttrs' install guests)
      (mapAttrs' instance guests)
      (concatMapAttrs helpers guests)
      {
        "nixvmm@" = {
          overrideStrategy = "asDropin";
          # Scripts and fingers know it by this name.
          aliases = [ "microvm@.service" ];
          path = [ pkgs.coreutils ];
          serviceConfig.TimeoutStartSec = cfg.host.startupTimeout;
        };
        "nixvmm-booted@" = {
          overrideStrategy = "asDropin";
          path = [ pkgs.coreutils ];
        };
      }
      (mkIf hasForeign units.foreignHelpers)
    ];

    microvm.autostart = lib.attrNames (lib.filterAttrs (_: { autostart, ... }: autostart) cfg.vms);
    systemd.targets.nixvmm = {
      aliases = [ "microvms.target" ];
      wantedBy = [ "multi-user.target" ];
      wants = map (name: "nixvmm@${name}.service") cfg.autostart;
    };

    environment.systemPackages = optional (pkgs ? nixvmm) pkgs.nixvmm;

    system.activationScripts.microvm-orphans = ''
      for folder in ${stateDir}/*/; do
        name=$(${coreutil "basename"} "$folder")
        case " ${toString (lib.attrNames cfg.vms)} " in
          *" $name "*) ;;
          *)
            if [ -L "$folder/toplevel" ]; then
              echo "the guest $name is no longer configured; rm -r $folder deletes its state"
            fi
            ;;
        esac
      done
    '';
  };
}
