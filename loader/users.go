// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUserNamespace says that the ids of a pod with a user namespace of its own
// could not be found.
var ErrUserNamespace = errors.New("the pod's user namespace")

// HostIDs says how the host numbers a user and a group of the pod: that is how
// the programs see them. hostUsers is the pod's; it must be true of the network
// namespace too, which is owned by the pod's user namespace.
//
// No process of the pod runs yet whose uid_map could be read, and none is
// started for it: the kernel maps the owner of a file in a mount with the
// namespace's mapping. The mount is a tmpfs that is never attached anywhere;
// that can be mapped since Linux 6.3 (commit 7a80e5b8c6fa), which kubelets ask
// for too where pods are to have user namespaces.
func (n *Netns) HostIDs(uid, gid uint32, hostUsers bool) (hostUID, hostGID uint32, err error) {
	users, err := n.users()
	if err != nil {
		return 0, 0, err
	}
	defer users.close()
	switch own := users < 0; {
	case own && hostUsers:
		return uid, gid, nil
	case own:
		return 0, 0, fmt.Errorf("%w: hostUsers is false, but its network namespace %s is not owned by a user namespace of the pod's", ErrUserNamespace, n.path)
	}
	if hostUID, hostGID, err = mapIDs(users, uid, gid); err != nil {
		return 0, 0, fmt.Errorf("%w: find the proxy's ids: %w", ErrUserNamespace, err)
	}
	return hostUID, hostGID, nil
}

// users opens the user namespace that owns the network namespace; -1 where that
// is our own.
func (n *Netns) users() (fd, error) {
	const nsGetUserns = 0xb701 // NS_GET_USERNS
	r, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(n.fd), nsGetUserns, 0)
	if errno != 0 {
		return -1, fmt.Errorf("get its user namespace: %w", errno)
	}
	users := fd(r)
	unix.CloseOnExec(int(users))
	var own, its unix.Stat_t
	err := unix.Fstat(int(users), &its)
	if err == nil {
		err = unix.Stat("/proc/self/ns/user", &own)
	}
	if err != nil || its.Ino == own.Ino && its.Dev == own.Dev {
		users.close()
		return -1, err
	}
	return users, nil
}

// mapIDs maps ids of a user namespace to our own.
func mapIDs(users fd, uid, gid uint32) (uint32, uint32, error) {
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return 0, 0, fmt.Errorf("open a tmpfs: %w", err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return 0, 0, fmt.Errorf("make a tmpfs: %w", err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return 0, 0, fmt.Errorf("mount a tmpfs: %w", err)
	}
	defer unix.Close(mnt)
	if err := unix.Fchownat(mnt, "", int(uid), int(gid), unix.AT_EMPTY_PATH); err != nil {
		return 0, 0, fmt.Errorf("chown in a tmpfs: %w", err)
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users)}
	if err := unix.MountSetattr(mnt, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return 0, 0, fmt.Errorf("map a tmpfs (since Linux 6.3): %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstatat(mnt, "", &st, unix.AT_EMPTY_PATH); err != nil {
		return 0, 0, err
	}
	// What has no mapping is shown as the overflow ids.
	if st.Uid == overflow("uid") || st.Gid == overflow("gid") {
		return 0, 0, fmt.Errorf("uid %d or gid %d has no mapping there", uid, gid)
	}
	return st.Uid, st.Gid, nil
}

// overflow gives the id that stands for all that can't be shown.
func overflow(kind string) uint32 {
	const byDefault = 65534
	b, err := os.ReadFile("/proc/sys/kernel/overflow" + kind)
	if err != nil {
		return byDefault
	}
	var id uint32
	if _, err := fmt.Sscan(strings.TrimSpace(string(b)), &id); err != nil {
		return byDefault
	}
	return id
}
