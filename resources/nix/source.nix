# The part of the tree that the program is built from: a change elsewhere rebuilds nothing.
{ lib }:

lib.fileset.toSource {
  root = ../..;
  fileset = lib.fileset.unions [
    ../../Cargo.lock
    ../../Cargo.toml
    ../../arch
    ../../boot
    ../../cli
    ../../devices
    ../../tests
    ../../vmm
  ];
}
