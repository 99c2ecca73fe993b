# The guest's store as an image. Paths are handed to mkfs where they are, and nothing is compared with
# anything else, so that it takes seconds.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib) mkDefault mkIf;

  cfg = config.microvm;

  # What the guest's Nix database learns at its start.
  registration = pkgs.closureInfo { rootPaths = [ config.system.build.toplevel ]; };
  registers = cfg.registerClosure && config.nix.enable;

  closure = pkgs.writeClosure (
    [ config.system.build.toplevel ] ++ lib.optional registers registration
  );

  image =
    {
      erofs = {
        package = pkgs.buildPackages.erofs-utils;
        # Times and owners are those of a store; the label is for those who mount by it.
        command = "mkfs.erofs ${toString cfg.storeDiskErofsFlags} -T 0 --all-root -L nix-store --mount-point=/nix/store $out store";
      };
      squashfs = {
        package = pkgs.buildPackages.squashfs-tools-ng;
        command = "gensquashfs ${toString cfg.storeDiskSquashfsFlags} -D store --all-root -q $out";
      };
    }
    .${cfg.storeDiskType};
in
{
  config = lib.mkMerge [
    (mkIf (cfg.guest.enable && cfg.storeOnDisk) {
      # A hardened system blacklists erofs; asking for that list here would be asked back.
      microvm.storeDiskType = mkDefault (
        if config.security.virtualisation.flushL1DataCache or null == "always" then "squashfs" else "erofs"
      );

      boot.initrd.availableKernelModules = [ cfg.storeDiskType ];

      microvm.storeDisk =
        pkgs.buildPackages.runCommandLocal "microvm-store-disk.${cfg.storeDiskType}"
          {
            nativeBuildInputs = [
              pkgs.buildPackages.bubblewrap
              image.package
            ];
            passthru = { inherit registration; };
            # The image contains what it refers to.
            __structuredAttrs = true;
            unsafeDiscardReferences.out = true;
          }
          ''
            mkdir store
            binds=()
            while read -r path; do
              name=''${path##*/}
              if [ -d "$path" ] && [ ! -L "$path" ]; then mkdir "store/$name"; else touch "store/$name"; fi
              binds+=(--ro-bind "$path" "$PWD/store/$name")
            done < ${closure}
            make() { ${image.command}; }
            export -f make
            export out
            if ! bwrap --dev-bind / / --chdir "$PWD" "''${binds[@]}" -- "$BASH" -c make; then
              echo "no namespaces here: copying the store"
              rm -rf store "$out"
              mkdir store
              xargs cp -a -t store < ${closure}
              make
            fi
          '';
    })

    (mkIf (cfg.guest.enable && registers) {
      microvm.kernelParams = [ "regInfo=${registration}/registration" ];
      boot.postBootCommands = ''
        if [[ "$(cat /proc/cmdline)" =~ regInfo=([^ ]*) ]]; then
          ${config.nix.package.out or config.nix.package}/bin/nix-store --load-db < "''${BASH_REMATCH[1]}"
        fi
      '';
    })
  ];
}
