# Puts the hooks of variant.c into the kernel's mtty.c, as it is unpacked.
#
# Usage:   awk -f variant.awk mtty.c >mtty_hooked.inc
# Inputs:  the kernel's samples/vfio-mdev/mtty.c.
# Outputs: the same with each anchor below, a whole line but for its blanks, replaced or followed by a hook. What the
#          hooks do, and why, is in variant.c; here is only where they go.
# Failure: non-zero, with the anchor on stderr, where one is not found exactly once: the kernel's file has changed,
#          and whoever takes the new kernel looks at what the hook is for.

function squeeze(line) {
	gsub(/[ \t]+/, " ", line)
	gsub(/^ | $/, "", line)
	return line
}

function instead(anchor, line) {
	replacement[anchor] = line
	found[anchor] = 0
}

function behind(anchor, line) {
	insertion[anchor] = line
	found[anchor] = 0
}

BEGIN {
	# Names: both modules are loaded side by side.
	instead("#define MTTY_CLASS_NAME \"mtty\"", "#define MTTY_CLASS_NAME VARIANT_PARENT")
	instead("#define MTTY_NAME \"mtty\"", "#define MTTY_NAME VARIANT_PARENT")
	instead(".name = \"mtty\",", ".name = KBUILD_MODNAME,")

	# State of the variant, in each device and each data stream.
	behind("u8 disabled:1;", "struct variant_stream variant;")
	behind("u8 intx_mask:1;", "struct variant_device variant;")

	# Opening, closing, resetting.
	instead(".close_device = mtty_close,", ".open_device = variant_open, .close_device = variant_close,")
	instead("dev_info->flags = VFIO_DEVICE_FLAGS_PCI;", "dev_info->flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;")
	instead("return mtty_reset(mdev_state);", "return variant_reset(mdev_state);")
	behind("mdev_state->deferred_reset = false;", "variant_power_on(mdev_state);")

	# A register was written.
	behind("handle_bar_write(index, mdev_state, offset, buf, count);", "variant_wrote(mdev_state, *buf);")

	# A hop, once it is in the kernel log.
	behind("dev_dbg(mdev_state->vdev.dev, \"%s: %d -> %d\\n\", __func__, cur, new);", \
		"struct file *variant_filp; if (variant_step(mdev_state, new, &variant_filp)) return variant_filp;")

	# The streams.
	behind("migf->data.nr_ports = mdev_state->nr_ports;", "variant_begin_save(migf);")
	instead("info.dirty_bytes = 0;", "info.dirty_bytes = variant_dirty(migf);")
	instead(".read = mtty_save_read,", ".read = variant_save_read,")
	instead(".write = mtty_resume_write,", ".write = variant_resume_write,")
	instead(".migration_get_data_size = mtty_get_data_size,", ".migration_get_data_size = variant_get_data_size,")

	# The DMA log.
	instead(".log_start = mtty_log_start,", ".log_start = variant_log_start,")
	instead(".log_stop = mtty_log_stop,", ".log_stop = variant_log_stop,")
	instead(".log_read_and_clear = mtty_log_read_and_clear,", ".log_read_and_clear = variant_log_report,")
}

{
	anchor = squeeze($0)
	if (!(anchor in found)) {
		print
		next
	}
	found[anchor]++
	if (anchor in replacement) {
		print replacement[anchor]
	} else {
		print
		print insertion[anchor]
	}
}

END {
	for (anchor in found) {
		if (found[anchor] != 1) {
			printf "variant.awk: found %d times instead of once: %s\n", found[anchor], anchor >"/dev/stderr"
			failed = 1
		}
	}
	exit failed
}
