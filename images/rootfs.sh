#!/bin/sh
# rootfs.sh DIRECTORY PACKAGE...: copies the files of installed Debian packages, and of nothing else, into
# DIRECTORY: a root file system without shell, package tools or documentation. What came from where
# stands in var/lib/dpkg/status.d, where scanners look for it.
set -eu
root=$1
shift
# Documentation but for copyright; tables of character sets that nobody converts; what of Python is for developers.
leave='^/usr/share/(man|info|lintian|locale|bug|gcc|gdb|doc-base|doc/.*[^t]$)|/gconv/|/python3.11/(lib2to3|pydoc_data|idlelib|ensurepip|distutils|unittest)/'
mkdir -p "$root/usr" "$root/tmp" "$root/var/lib/dpkg/status.d" "$root/etc/ssl" "$root/run"
chmod 1777 "$root/tmp"
for link in bin sbin lib lib32 lib64 libx32; do
    if [ -L "/$link" ]; then mkdir -p "$root/usr/$link" && ln -s "usr/$link" "$root/$link"; fi
done
for package in "$@"; do
    dpkg -L "$package" | grep -Ev "$leave" | while read -r path; do
        # The list holds directories and diverted files too.
        if [ -L "$path" ] || [ -f "$path" ]; then
            case "$path" in /bin/* | /sbin/* | /lib/* | /lib64/*) path="/usr$path" ;; esac
            mkdir -p "$root$(dirname "$path")" && cp -a "$path" "$root$path"
        fi
    done
    dpkg-query -s "$package" >"$root/var/lib/dpkg/status.d/${package%%:*}"
done
cp -a /etc/ssl/certs "$root/etc/ssl/"
grep -E '^(root|nobody|hbm):' /etc/passwd >"$root/etc/passwd"
grep -E '^(root|nogroup|hbm):' /etc/group >"$root/etc/group"
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
ldconfig -r "$root"
