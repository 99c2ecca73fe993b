# Shell lines that make the volumes which do not exist, whole or not at all, and grow those that the
# configuration has made larger.
{ lib, pkgs }:

volumes:

let
  inherit (lib) escapeShellArg escapeShellArgs optionals;

  fileSystems = {
    ext2 = {
      package = pkgs.e2fsprogs;
      label = "-L";
    };
    ext3 = fileSystems.ext2;
    ext4 = fileSystems.ext2;
    xfs = {
      package = pkgs.xfsprogs;
      label = "-L";
    };
    btrfs = {
      package = pkgs.btrfs-progs;
      label = "-L";
    };
    vfat = {
      package = pkgs.dosfstools;
      label = "-n";
    };
  };

  fileSystem =
    { image, fsType, ... }:
    fileSystems.${fsType}
      or (throw "volume ${image}: no file system ${fsType} can be made; set autoCreate = false, or fsType to one of ${toString (lib.attrNames fileSystems)}");

  make =
    volume@{
      image,
      size ? throw "volume ${image}: give it a size in MiB, or set autoCreate = false",
      fsType,
      label ? null,
      mkfsExtraArgs ? [ ],
      ...
    }:
    let
      words =
        optionals (label != null) [
          (fileSystem volume).label
          label
        ]
        ++ mkfsExtraArgs;
      path = escapeShellArg image;
      unfinished = escapeShellArg "${image}.unfinished";
    in
    ''
      if [ ! -e ${path} ]; then
        echo "making the volume "${path}" of ${toString size} MiB" >&2
        rm -f ${unfinished}
        touch ${unfinished}
        # Where the file system copies what is written, an image falls to pieces.
        chattr +C ${unfinished} 2>/dev/null || true
        truncate -s ${toString size}M ${unfinished}
        mkfs.${fsType} ${escapeShellArgs words} ${unfinished} >&2
        mv ${unfinished} ${path}
      elif [ -f ${path} ]; then
        length=$(stat -c %s ${path})
        if [ "$length" -lt ${toString (size * 1024 * 1024)} ]; then
          truncate -s ${toString size}M ${path}
          echo "the volume "${path}" has grown to ${toString size} MiB; grow its file system in the guest" >&2
        elif [ "$length" -gt ${toString (size * 1024 * 1024)} ]; then
          echo "the volume "${path}" stays larger than ${toString size} MiB: shrinking would lose data" >&2
        fi
      fi
    '';

  created = builtins.filter (volume: volume.autoCreate or true) volumes;
in
lib.optionalString (created != [ ]) ''
  PATH=${
    lib.makeBinPath (
      [ pkgs.coreutils ] ++ lib.unique (map (volume: (fileSystem volume).package) created)
    )
  }''${PATH:+:$PATH}
''
+ lib.concatMapStrings make created
