# The part of the tree that the program is built from, and what else is needed: a change elsewhere
# rebuilds nothing.
{
  lib,
  also ? [ ],
}:

lib.fileset.toSource {
  root = ../..;
  fileset = lib.fileset.unions (
    [
      ../../Cargo.lock
      ../../Cargo.toml
      ../../arch
      ../../boot
      ../../cli
      ../../devices
      ../../tests
      ../../vmm
    ]
    ++ also
  );
}
