# Programs that bring a guest to another host, and a new system into a running guest.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkIf mkOption types;
  inherit (config.networking) hostName;

  cfg = config.microvm;
  inherit (config.system.build) toplevel;
  closureInfo = pkgs.closureInfo { rootPaths = [ toplevel ]; };

  # To be built there, not here.
  outside = builtins.unsafeDiscardStringContext;

  folder = "/var/lib/microvms/${hostName}";

  canSwitch =
    (config.system.switch.enable or false)
    && config.services.openssh.enable
    && lib.any ({ source, ... }: source == "/nix/store") cfg.shares;

  target = program: ''
    set -euo pipefail
    if [ $# -lt 1 ]; then
      echo "usage: ${program} root@HOST [--use-remote-sudo]" >&2
      exit 2
    fi
    host=$1
    shift
    shell=(/bin/sh -eu)
    if [ "''${1:-}" = --use-remote-sudo ]; then
      shell=(sudo "''${shell[@]}")
      shift
    fi
  '';

  program = description: {
    type = types.nullOr types.package;
    default = null;
    inherit description;
  };
in
{
  options.microvm.deploy = {
    installOnHost = mkOption {
      type = types.package;
      description = "Builds this guest on another host, with the arguments root@HOST [--use-remote-sudo], and installs it there.";
    };
    sshSwitch = mkOption (
      program "Switches the running guest, root@GUEST ACTION, to this system, which its host has in its store."
    );
    rebuild = mkOption (program "Both: root@HOST root@GUEST ACTION.");
  };

  config.microvm.deploy = mkIf cfg.guest.enable {
    installOnHost = pkgs.writeShellScriptBin "microvm-install-on-host" ''
      ${target "microvm-install-on-host"}
      echo "copying what to build to $host" >&2
      nix copy --no-check-sigs --to "ssh-ng://$host" --derivation '${outside cfg.declaredRunner.drvPath}^out'
      ssh "$host" -- "''${shell[@]}" <<'REMOTE'
      mkdir -p ${folder} /nix/var/nix/gcroots/microvm
      cd ${folder}
      for link in current booted old; do
        prefix=$link-; if [ $link = current ]; then prefix=; fi
        ln -sfn ${folder}/$link /nix/var/nix/gcroots/microvm/''${prefix}${hostName}
      done
      nix build --print-build-logs --accept-flake-config --out-link new '${outside cfg.declaredRunner.drvPath}^out'
      if [ "$(readlink current 2>/dev/null)" = "$(readlink new)" ]; then
        rm new
        echo "${hostName} is up to date"
      else
        if [ -L current ]; then mv -T current old; fi
        mv -T new current
        echo "${hostName} is installed; it runs after: systemctl restart nixvmm@${hostName}"
      fi
      REMOTE
    '';

    sshSwitch = mkIf canSwitch (
      pkgs.writeShellScriptBin "microvm-switch" ''
        ${target "microvm-switch"}
        action=''${1:-switch}
        ssh "$host" -- "''${shell[@]}" <<REMOTE
        if [ "\$(cat /etc/hostname)" != '${hostName}' ]; then
          echo "$host is not ${hostName}" >&2
          exit 1
        fi
        nix-store --load-db < ${outside "${closureInfo}"}/registration
        nix-env -p /nix/var/nix/profiles/system --set ${outside "${toplevel}"}
        ${outside "${toplevel}"}/bin/switch-to-configuration $action
        REMOTE
      ''
    );

    rebuild = mkIf canSwitch (
      pkgs.writeShellScriptBin "microvm-rebuild" ''
        set -euo pipefail
        if [ $# -lt 2 ]; then
          echo "usage: microvm-rebuild root@HOST root@GUEST [switch|boot|test|dry-activate]" >&2
          exit 2
        fi
        ${cfg.deploy.installOnHost}/bin/microvm-install-on-host "$1"
        exec ${cfg.deploy.sshSwitch}/bin/microvm-switch "''${@:2}"
      ''
    );
  };
}
