# SPDX-License-Identifier: GPL-2.0-or-later
# What a person does on a machine where luksrotd is installed, in short.  Key files are in the current folder.

# What fails in $(...) fails here too.
shopt -s inherit_errexit

# Keys that cost nothing to guess, and so no time to test with; and ones that take a few seconds.
fast='2 pbkdf s pbkdf2 pbkdf-force-iterations u 1000'
slow='2 pbkdf s pbkdf2 pbkdf-force-iterations u 50000'

# patiently COMMAND...: until it succeeds; fail, and say so, if it never does.  Each look costs more than the wait.
patiently() {
    local tries
    for ((tries = 0; tries < 240; tries++)); do
        if "$@"; then return; fi
        sleep 0.5
    done
    echo "in vain: $*" >&2
    return 1
}

# volume NODE: the object path of the volume, as soon as the daemon has it
volume() {
    local answer
    patiently known "$1"
    cut -d'"' -f2 <<<"$answer"
}

# known NODE: whether the daemon has it, and then its answer in $answer
known() {
    answer=$(busctl call org.luksrotd1 /org/luksrotd1 org.luksrotd1.Manager GetDevice 'sa{sv}' "$1" 0 2>/dev/null)
}

# start VERB NODE OLD NEW [OPTIONS]: the object path of the job
start() {
    local path reply
    path=$(volume "$2")
    reply=$(busctl --timeout=100 call org.luksrotd1 "$path" org.luksrotd1.Device "$1" 'sa{sv}a{sv}a{sv}' backup \
        1 keyfile s "$PWD/$3" 1 keyfile s "$PWD/$4" ${5:-$fast})
    cut -d'"' -f2 <<<"$reply"
}

# start_plain VERB NODE: likewise, for what needs no key
start_plain() {
    local path reply
    path=$(volume "$2")
    reply=$(busctl --timeout=100 call org.luksrotd1 "$path" org.luksrotd1.Device "$1" 'sa{sv}' backup 0)
    cut -d'"' -f2 <<<"$reply"
}

# held JOB: wait until it derives the new key (or derives it again, to verify it), and stop its worker in that
held() {
    local stage
    patiently prepared "$1"
    [[ $stage =~ deriving|verifying ]] || { echo "$1: $stage"; return 1; }
    pkill -STOP --uid luksrotd-worker
    [ "$(of_job "$1" State)" = 's "running"' ]
}

# prepared JOB: whether it has come as far as deriving a key, and then its $stage
prepared() {
    stage=$(of_job "$1" Stage)
    [[ ! $stage =~ queued|locking|reading ]]
}

# goes_on JOB: what held has stopped; it must have stayed where it was
goes_on() {
    [[ $(of_job "$1" Stage) =~ deriving|verifying ]]
    pkill -CONT --uid luksrotd-worker
}

# of_job JOB PROPERTY...: a line for each
of_job() {
    busctl get-property org.luksrotd1 "$1" org.luksrotd1.Job "${@:2}"
}

# ended JOB: wait for its end; its state, outcome and error
ended() {
    [ -n "$1" ]
    patiently over "$1"
    of_job "$1" State Outcome ErrorName ErrorMessage
}

# over JOB: whether it has ended
over() {
    local state
    state=$(of_job "$1" State)
    [[ $state =~ finished|failed|cancelled ]]
}

# done_well JOB: fail unless it ends well
done_well() {
    local end
    end=$(ended "$1")
    [[ $end == 's "finished"'* ]] || { echo "$end"; journalctl --no-pager --unit luksrotd | tail -n 50; return 1; }
}

# rotate NODE OLD NEW
rotate() {
    local job
    job=$(start Rotate "$@")
    done_well "$job"
}

# opens NODE KEY: whether it does
opens() {
    cryptsetup open --test-passphrase --key-file "$2" "$1"
}

# write_without_end FOLDER: in the background, with flushes; each file has its own checksum for a name
write_without_end() {
    (
        number=0
        while :; do
            head -c 65536 /dev/urandom >"$1/new"
            sync "$1/new"
            mv "$1/new" "$1/$(sha256sum <"$1/new" | cut -c1-64)"
            [ $((number++)) -lt 200 ] || exit 0
            sleep 0.5
        done
    ) </dev/null >/dev/null 2>&1 &
}

# all_right FOLDER: whether each of these files is what it was written as; there must be some
all_right() {
    local file found=
    for file in "$1"/????????????????????????????????????????????????????????????????; do
        found=$(sha256sum <"$file" | cut -c1-64)
        [ "$found" = "${file##*/}" ] || { echo "$file is not what was written"; return 1; }
    done
    [ -n "$found" ]
}

# reconcile DRY: the findings on all volumes, on one line
reconcile() {
    busctl --timeout=300 call org.luksrotd1 /org/luksrotd1 org.luksrotd1.Manager Reconcile 'a{sv}' 1 dry-run b "$1"
}

# clean NODE: fail unless it is the only volume there is, and reconcile finds nothing to do
clean() {
    local found
    volume "$1" >/dev/null
    found=$(reconcile true)
    [[ $found == *' 1 "/org/luksrotd1/device/'*'" 0 0 ""' ]] || { echo "$found"; return 1; }
}
