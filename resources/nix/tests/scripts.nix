# Programs of guests, as text. The ones of `run` are run, beside programs of the tests below `store`;
# of the others the shell looks at the grammar alone.
{
  guest,
  host,
  lib,
  store,
  ...
}:

let
  run = guest {
    microvm = {
      preStart = "echo prepared > prepared";
      extraArgsScript = "${store}/more-arguments";
      nixvmm.extraArgs = [ "--timing" ];
      credentialFiles.token = "/run/secrets/token";
      volumes = [
        {
          image = "data.img";
          mountPoint = "/data";
          size = 8;
          label = "data";
        }
        {
          image = "small blocks.img";
          mountPoint = null;
          size = 8;
          mkfsExtraArgs = [
            "-b"
            "1024"
          ];
        }
        {
          image = "foreign.img";
          mountPoint = null;
          autoCreate = false;
        }
      ];
    };
  };

  connected = guest {
    microvm = {
      volumes =
        map
          (fsType: {
            inherit fsType;
            image = "${fsType}.img";
            mountPoint = null;
            size = 512;
          })
          [
            "xfs"
            "btrfs"
            "vfat"
          ];
      interfaces =
        lib.imap0
          (
            index: interface:
            {
              id = "vm-${interface.type}";
              mac = "02:00:00:00:00:0${toString index}";
            }
            // interface
          )
          [
            { type = "tap"; }
            {
              type = "bridge";
              bridge = "br0";
            }
            {
              type = "macvtap";
              macvtap.link = "eth0";
              macvtap.mode = "bridge";
            }
            { type = "user"; }
          ];
    };
  };

  switched = guest {
    services.openssh.enable = true;
    microvm.shares = [
      {
        tag = "store";
        source = "/nix/store";
        mountPoint = "/nix/.ro-store";
      }
    ];
  };

  system = host {
    microvm.vms.web.evaluatedConfig.config = run;
  };
in
{
  run = run.microvm.declaredRunner.programs;
  others =
    connected.microvm.declaredRunner.programs
    // lib.mapAttrs (_: program: program.text) {
      inherit (switched.microvm.deploy) installOnHost sshSwitch rebuild;
    }
    // {
      install = system.systemd.services.install-microvm-web.script;
      orphans = system.system.activationScripts.microvm-orphans;
    };
}
