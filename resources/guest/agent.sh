#!/bin/sh
# The test agent: runs what the tests send over the terminal it is given, one command at a time.
#   run ID COMMAND   asks, with the command in base64
#   agent: done ID STATUS OUTPUT   answers, with both output streams in base64
# A line that is anything else is ignored. Kernel messages below emergencies stay off the terminal.
exec < "/dev/$1" > "/dev/$1" 2>&1
stty raw -echo
dmesg -n 1
mkdir -p /run/agent
printf '\nagent: ready\n'
while read -r word id encoded; do
    [ "$word" = run ] || continue
    printf %s "$encoded" | base64 -d > /run/agent/command
    sh /run/agent/command > /run/agent/output 2>&1 < /dev/null
    printf '\nagent: done %s %s %s\n' "$id" "$?" "$(base64 -w 0 /run/agent/output)"
done
