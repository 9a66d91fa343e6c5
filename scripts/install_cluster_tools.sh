#!/bin/sh
# Install what the cluster tests start: Slurm, Open MPI, sshd, and tools for network namespaces (Debian and Ubuntu).
# Installs what is missing only, says what it could not install, and never fails: the tests that need it then skip.
set -u

have() { PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1; }

missing=""
need() { # need PROGRAM PACKAGE
    have "$1" || case " $missing " in *" $2 "*) ;; *) missing="$missing $2" ;; esac
}
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
need munged munge
need mpirun openmpi-bin
need ip iproute2
need nft nftables
need sshd openssh-server
need ssh openssh-client
[ -n "$missing" ] || exit 0

skip() {
    echo "cluster tests: not installed:$missing ($1); the tests that need them are skipped"
    exit 0
}
have apt-get || skip "there is no apt-get here: install them with your system's package manager"
[ "$(id -u)" -eq 0 ] || skip "not root: run sudo sh $0"

# No service is started: the tests start their own, with their own configuration.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install --quiet --yes --no-install-recommends "$@" >>"$log" 2>&1
}
if ! install $missing; then
    apt-get update --quiet >>"$log" 2>&1
    # One package at a time only then, so that one that cannot be had does not keep out the others.
    install $missing || for package in $missing; do
        install "$package" ||
            echo "cluster tools: $package could not be installed ($(tail -n 1 "$log")); the tests that need it are skipped"
    done
fi
rm -f "$log"
exit 0
