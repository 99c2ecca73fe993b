#!/bin/sh
# The test agent: runs what the tests send over the terminal it is given, one command at a time.
#   run ID COMMAND                   asks, with a shell command of one line
#   agent: done ID STATUS LENGTH     answers, and LENGTH bytes of both output streams follow
# A line that is anything else is ignored. Kernel messages below emergencies stay off the terminal.
exec < "/dev/$1" > "/dev/$1" 2>&1
stty raw -echo
dmesg -n 1
mkdir -p /run/agent
printf '\nagent: ready\n'
while read -r word id command; do
    [ "$word" = run ] || continue
    sh -c "$command" > /run/agent/output 2>&1 < /dev/null
    printf '\nagent: done %s %s %s\n' "$id" "$?" "$(wc -c < /run/agent/output)"
    cat /run/agent/output
done
