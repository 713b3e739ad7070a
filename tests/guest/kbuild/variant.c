// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
/*
 * A test-only variant of the kernel's mtty sample, for what the sample itself cannot show.
 *
 * mtty_hooked.inc is the kernel's own mtty.c with calls of the hooks below, which variant.awk puts in when the test
 * guest is built. With all parameters at their defaults the variant differs from mtty in this: its reset clears the
 * registers, and is announced; nothing is loaded after a write that failed; a device that is found in RESUMING refuses
 * every SET instead of following a null pointer.
 *
 * Parameters (/sys/module/mtty_variant/parameters, of the module: they hold for all its devices)
 *
 *   migration_flags   STOP_COPY 1, P2P 2, PRE_COPY 4. Read on open; a device whose flags change is reset.
 *   reset_on_close    the last close resets the device, as with vfio-pci. Read on close.
 *   enomsg            a read in pre-copy that finds nothing answers ENOMSG, not 0. Read with each read.
 *   dirty_bytes       0: the stream is mtty's. N: after a register write in pre-copy N bytes are dirty, and are handed
 *                     out as a record of N bytes. Read when a session begins. At most 65536.
 *   no_dma_log        the device keeps no DMA log: asked for one, VFIO answers ENOTTY. Read on open.
 *   no_data_size      asked how much state there is, the device answers ENODATA. Read with each question.
 *   dma_dirty         the DMA log works: a register write in RUNNING or PRE_COPY is a write of the device to the page
 *                     whose index is the value written, modulo the number of pages tracked (all ranges, in
 *                     order of their addresses). Read when a log is started; a report without a start is refused while it is
 *                     set. Pages are from 4 KiB to 64 KiB.
 *   fail_hops         from,to[,from,to…]: each hop fails once with EIO and leaves the device at `from`. A pair is used
 *                     up by the hop and reads -1,-1 then. "-1" clears the list.
 *   error_hops        the same, but the device falls into ERROR.
 *   fail_resets       so many resets that somebody asks for fail with EIO and change nothing. Counts down.
 *
 * The stream with dirty_bytes = N
 *
 *   header (24 bytes, mtty's, flags = N) { 0x80 | sequence, N - 1 bytes of filling } ... { sequence } ports
 *
 * The sequence counts records from 0, modulo 128. A record stands for state that the ports at the end supersede, so its
 * filling is not applied; but a record that is missing, doubled, cut or out of order is found by whoever loads.
 *
 * Locks: ops_lock guards the registers and the DMA log, and is taken inside state_mutex, never around it.
 */

#include <linux/bitmap.h>
#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vfio.h>

#define VARIANT_PARENT		"mttyv"
#define VARIANT_MAX_RECORD	65536
#define VARIANT_MAX_LOG_PAGES	(1UL << 24)
#define VARIANT_RECORD		0x80
#define VARIANT_SEQUENCE	0x7f

struct mdev_state;
struct mtty_migration_file;

struct variant_range {
	u64 first;	/* rounded out to pages */
	u64 last;
	u64 asked_first;
	u64 asked_last;
};

struct variant_log {
	unsigned long *dirty;	/* NULL: not started */
	struct variant_range *ranges;
	u32 nranges;
	u64 page;
	u64 pages;
};

struct variant_device {
	atomic_t writes;	/* to registers, ever */
	struct variant_log log;
};

struct variant_stream {
	u32 record;	/* bytes of a record; 0: the stream is mtty's */
	u32 at;		/* byte of the record under way; 0: none is */
	int seen;	/* register writes that are handed out */
	u8 sequence;
	bool ended;	/* the ports follow */
	bool broken;	/* a write failed */
};

static int variant_open(struct vfio_device *vdev);
static void variant_close(struct vfio_device *vdev);
static int variant_reset(struct mdev_state *mdev_state);
static void variant_power_on(struct mdev_state *mdev_state);
static void variant_wrote(struct mdev_state *mdev_state, u8 value);
static bool variant_step(struct mdev_state *mdev_state, enum vfio_device_mig_state new,
			 struct file **result);
static void variant_begin_save(struct mtty_migration_file *migf);
static u64 variant_dirty(struct mtty_migration_file *migf);
static ssize_t variant_save_read(struct file *filp, char __user *buf, size_t len, loff_t *pos);
static ssize_t variant_resume_write(struct file *filp, const char __user *buf, size_t len,
				    loff_t *pos);
static int variant_get_data_size(struct vfio_device *vdev, unsigned long *stop_copy_length);
static int variant_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes,
			     u64 *page_size);
static int variant_log_stop(struct vfio_device *vdev);
static int variant_log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			      struct iova_bitmap *dirty);

/* The variant's own writes take its place. */
static ssize_t __maybe_unused mtty_resume_write(struct file *filp, const char __user *buf,
						size_t len, loff_t *pos);

#include "mtty_hooked.inc"

MODULE_IMPORT_NS(IOMMUFD);

#define VARIANT_HEADER offsetof(struct mtty_data, ports)

/* --- parameters --- */

static int variant_set_flags(const char *value, const struct kernel_param *kp)
{
	return param_set_uint_minmax(value, kp, 0, 7);
}

static int variant_set_dirty_bytes(const char *value, const struct kernel_param *kp)
{
	return param_set_uint_minmax(value, kp, 0, VARIANT_MAX_RECORD);
}

static const struct kernel_param_ops variant_flags_ops = {
	.set = variant_set_flags,
	.get = param_get_uint,
};

static const struct kernel_param_ops variant_dirty_ops = {
	.set = variant_set_dirty_bytes,
	.get = param_get_uint,
};

static unsigned int migration_flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P |
				      VFIO_MIGRATION_PRE_COPY;
module_param_cb(migration_flags, &variant_flags_ops, &migration_flags, 0644);

static bool reset_on_close;
module_param(reset_on_close, bool, 0644);

static bool enomsg;
module_param(enomsg, bool, 0644);

static unsigned int dirty_bytes;
module_param_cb(dirty_bytes, &variant_dirty_ops, &dirty_bytes, 0644);

static bool no_data_size;
module_param(no_data_size, bool, 0644);

static bool dma_dirty;
module_param(dma_dirty, bool, 0644);

static bool no_dma_log;
module_param(no_dma_log, bool, 0644);

static int fail_hops[16];
static unsigned int fail_hops_count;
module_param_array(fail_hops, int, &fail_hops_count, 0644);

static int error_hops[16];
static unsigned int error_hops_count;
module_param_array(error_hops, int, &error_hops_count, 0644);

static unsigned int fail_resets;
module_param(fail_resets, uint, 0644);

/* Whether a list names a hop, which is used up by that. */
static bool variant_strikes(int *hops, const unsigned int *count, int from, int to)
{
	bool struck = false;
	unsigned int i;

	kernel_param_lock(THIS_MODULE);
	for (i = 0; i + 1 < *count && !struck; i += 2) {
		if (hops[i] == from && hops[i + 1] == to) {
			hops[i] = hops[i + 1] = -1;
			struck = true;
		}
	}
	kernel_param_unlock(THIS_MODULE);
	return struck;
}

/* --- opening, closing, resetting --- */

static int variant_open(struct vfio_device *vdev)
{
	struct mdev_state *mdev_state = container_of(vdev, struct mdev_state, vdev);
	unsigned int flags = READ_ONCE(migration_flags);

	/* What VFIO itself looks at. Nobody else has the device open. */
	vdev->log_ops = READ_ONCE(no_dma_log) ? NULL : &mtty_log_ops;
	/* Its state may be one that it no longer has. */
	if (vdev->migration_flags != flags) {
		vdev->migration_flags = flags;
		mtty_reset(mdev_state);
	}
	return 0;
}

static void variant_close(struct vfio_device *vdev)
{
	struct mdev_state *mdev_state = container_of(vdev, struct mdev_state, vdev);

	mtty_close(vdev);
	variant_log_stop(vdev);
	if (READ_ONCE(reset_on_close))
		mtty_reset(mdev_state);
}

static int variant_reset(struct mdev_state *mdev_state)
{
	bool fails;

	kernel_param_lock(THIS_MODULE);
	fails = fail_resets;
	if (fails)
		fail_resets--;
	kernel_param_unlock(THIS_MODULE);
	return fails ? -EIO : mtty_reset(mdev_state);
}

static void variant_free_log(struct variant_log *log)
{
	kvfree(log->dirty);
	kvfree(log->ranges);
	memset(log, 0, sizeof(*log));
}

/*
 * Called with state_mutex held, where mtty carries a reset out. It stops the DMA log, as the reset
 * of some drivers does.
 */
static void variant_power_on(struct mdev_state *mdev_state)
{
	int i;

	mutex_lock(&mdev_state->ops_lock);
	memset(mdev_state->s, 0, sizeof(mdev_state->s));
	for (i = 0; i < ARRAY_SIZE(mdev_state->s); i++)
		mdev_state->s[i].max_fifo_size = MAX_FIFO_SIZE;
	variant_free_log(&mdev_state->variant.log);
	mutex_unlock(&mdev_state->ops_lock);
}

/* --- hops --- */

/* Takes the hop in mtty's place, or returns false. Called with state_mutex held. */
static bool variant_step(struct mdev_state *mdev_state, enum vfio_device_mig_state new,
			 struct file **result)
{
	enum vfio_device_mig_state cur = mdev_state->state;
	struct mtty_migration_file *migf;

	*result = NULL;
	if (variant_strikes(error_hops, &error_hops_count, cur, new)) {
		mtty_disable_files(mdev_state);
		mdev_state->state = VFIO_DEVICE_STATE_ERROR;
		*result = ERR_PTR(-EIO);
		return true;
	}
	if (variant_strikes(fail_hops, &fail_hops_count, cur, new)) {
		*result = ERR_PTR(-EIO);
		return true;
	}
	/* The device was closed in RESUMING: there is nothing that could be loaded. */
	if (cur == VFIO_DEVICE_STATE_RESUMING && !mdev_state->resuming_migf) {
		*result = ERR_PTR(-EINVAL);
		return true;
	}
	/* The hops that only a device without P2P has. */
	if ((cur == VFIO_DEVICE_STATE_RUNNING && new == VFIO_DEVICE_STATE_STOP) ||
	    (cur == VFIO_DEVICE_STATE_STOP && new == VFIO_DEVICE_STATE_RUNNING))
		return true;
	if (cur == VFIO_DEVICE_STATE_PRE_COPY && new == VFIO_DEVICE_STATE_STOP_COPY) {
		migf = mtty_save_device_data(mdev_state, new);
		if (IS_ERR(migf))
			*result = ERR_CAST(migf);
		else if (migf)
			*result = get_file(migf->filp);
		return true;
	}
	return false;
}

/* --- a register was written --- */

/* Called with ops_lock held. */
static void variant_wrote(struct mdev_state *mdev_state, u8 value)
{
	struct variant_device *variant = &mdev_state->variant;
	enum vfio_device_mig_state state = READ_ONCE(mdev_state->state);

	atomic_inc(&variant->writes);
	if (variant->log.dirty &&
	    (state == VFIO_DEVICE_STATE_RUNNING || state == VFIO_DEVICE_STATE_PRE_COPY))
		set_bit(value % variant->log.pages, variant->log.dirty);
}

/* --- the saving stream --- */

static void variant_begin_save(struct mtty_migration_file *migf)
{
	migf->variant.record = READ_ONCE(dirty_bytes);
	migf->variant.seen = atomic_read(&migf->mdev_state->variant.writes);
	migf->data.flags = migf->variant.record;
}

static bool variant_is_dirty(struct mtty_migration_file *migf)
{
	return migf->variant.record &&
	       migf->variant.seen != atomic_read(&migf->mdev_state->variant.writes);
}

/* Called with the stream's lock held, in pre-copy. */
static u64 variant_dirty(struct mtty_migration_file *migf)
{
	u64 dirty = 0;

	if (migf->variant.at)
		dirty += migf->variant.record - migf->variant.at;
	if (variant_is_dirty(migf))
		dirty += migf->variant.record;
	return dirty;
}

/* The next byte of the records, or -1 where there is none. Called with the stream's lock held. */
static int variant_next(struct mtty_migration_file *migf, bool stopped)
{
	struct variant_stream *variant = &migf->variant;
	int byte;

	if (!variant->at) {
		if (stopped) {
			/* A change that was not handed out yet is in the ports, which are. */
			variant->ended = true;
			return variant->sequence;
		}
		if (!variant_is_dirty(migf))
			return -1;
		variant->seen = atomic_read(&migf->mdev_state->variant.writes);
		byte = VARIANT_RECORD | variant->sequence;
	} else {
		byte = (u8)(variant->sequence + variant->at);
	}
	if (++variant->at == variant->record) {
		variant->at = 0;
		variant->sequence = (variant->sequence + 1) & VARIANT_SEQUENCE;
	}
	return byte;
}

static ssize_t variant_save_read(struct file *filp, char __user *buf, size_t len, loff_t *pos)
{
	struct mtty_migration_file *migf = filp->private_data;
	struct variant_stream *variant = &migf->variant;
	bool stopped, records = false;
	ssize_t done = 0;

	if (pos)
		return -ESPIPE;

	mutex_lock(&migf->lock);
	stopped = migf->filled_size > VARIANT_HEADER;
	if (variant->record && !migf->disabled) {
		if (filp->f_pos < VARIANT_HEADER)
			len = min_t(size_t, len, VARIANT_HEADER - filp->f_pos);
		else
			records = !variant->ended;
	}
	while (records && done < len && !variant->ended) {
		int byte = variant_next(migf, stopped);

		if (byte < 0)
			break;
		if (put_user((u8)byte, buf + done)) {
			done = -EFAULT;
			break;
		}
		done++;
	}
	mutex_unlock(&migf->lock);

	if (!records)
		done = mtty_save_read(filp, buf, len, pos);
	if (!done && len && !stopped && READ_ONCE(enomsg)) {
		dev_dbg(migf->mdev_state->vdev.dev, "%s nothing now\n", __func__);
		return -ENOMSG;
	}
	return done;
}

static int variant_get_data_size(struct vfio_device *vdev, unsigned long *stop_copy_length)
{
	int ret = READ_ONCE(no_data_size) ? -ENODATA : mtty_get_data_size(vdev, stop_copy_length);

	/* The byte that ends the records. */
	if (!ret && READ_ONCE(dirty_bytes))
		*stop_copy_length += 1;
	return ret;
}

/* --- the resuming stream --- */

/* Takes one byte, or says what is wrong with it. Called with the stream's lock held. */
static int variant_take(struct mtty_migration_file *migf, u8 byte)
{
	struct variant_stream *variant = &migf->variant;
	struct mtty_data *data = &migf->data;

	if (migf->filled_size < VARIANT_HEADER || variant->ended) {
		if (migf->filled_size == mtty_data_size(migf->mdev_state))
			return -ENOMEM;
		((u8 *)data)[migf->filled_size++] = byte;
		if (migf->filled_size != VARIANT_HEADER)
			return 0;
		if (data->magic != MTTY_MAGIC || data->major_ver != MTTY_MAJOR_VER ||
		    data->minor_ver != MTTY_MINOR_VER || data->nr_ports != migf->mdev_state->nr_ports ||
		    data->flags > VARIANT_MAX_RECORD)
			return -EFAULT;
		variant->record = data->flags;
		variant->ended = !variant->record;
		return 0;
	}
	if (!variant->at) {
		if ((byte & VARIANT_SEQUENCE) != variant->sequence)
			return -EINVAL;
		if (!(byte & VARIANT_RECORD)) {
			variant->ended = true;
			return 0;
		}
	} else if (byte != (u8)(variant->sequence + variant->at)) {
		return -EINVAL;
	}
	if (++variant->at == variant->record) {
		variant->at = 0;
		variant->sequence = (variant->sequence + 1) & VARIANT_SEQUENCE;
	}
	return 0;
}

static ssize_t variant_resume_write(struct file *filp, const char __user *buf, size_t len,
				    loff_t *pos)
{
	struct mtty_migration_file *migf = filp->private_data;
	ssize_t done = 0;
	int ret = 0;

	if (pos)
		return -ESPIPE;

	mutex_lock(&migf->lock);
	if (migf->disabled)
		ret = -ENODEV;
	else if (migf->variant.broken)
		ret = -EINVAL;
	while (!ret && done < len) {
		u8 byte;

		ret = get_user(byte, buf + done);
		if (!ret)
			ret = variant_take(migf, byte);
		done++;
	}
	if (ret) {
		/* Too short to be loaded. */
		migf->variant.broken = true;
		migf->filled_size = 0;
	}
	mutex_unlock(&migf->lock);
	return ret ? ret : done;
}

/* --- the DMA log --- */

static int variant_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes,
			     u64 *page_size)
{
	struct mdev_state *mdev_state = container_of(vdev, struct mdev_state, vdev);
	struct interval_tree_node *node;
	struct variant_log log = {};
	int ret = 0;

	if (!READ_ONCE(dma_dirty))
		return mtty_log_start(vdev, ranges, nnodes, page_size);
	if (!is_power_of_2(*page_size))
		return -EINVAL;

	log.page = clamp_t(u64, *page_size, SZ_4K, SZ_64K);
	log.ranges = kvcalloc(nnodes, sizeof(*log.ranges), GFP_KERNEL);
	if (!log.ranges)
		return -ENOMEM;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		struct variant_range *range = &log.ranges[log.nranges++];

		range->asked_first = node->start;
		range->asked_last = node->last;
		range->first = round_down(node->start, log.page);
		range->last = node->last | (log.page - 1);
		log.pages += ((range->last - range->first) >> ilog2(log.page)) + 1;
		if (log.pages > VARIANT_MAX_LOG_PAGES) {
			ret = -ENOSPC;
			goto out;
		}
	}
	log.dirty = kvcalloc(BITS_TO_LONGS(log.pages), sizeof(long), GFP_KERNEL);
	if (!log.dirty) {
		ret = -ENOMEM;
		goto out;
	}

	mutex_lock(&mdev_state->ops_lock);
	if (mdev_state->variant.log.dirty) {
		ret = -EINVAL;
	} else {
		*page_size = log.page;
		swap(mdev_state->variant.log, log);
	}
	mutex_unlock(&mdev_state->ops_lock);
out:
	variant_free_log(&log);
	return ret;
}

static int variant_log_stop(struct vfio_device *vdev)
{
	struct mdev_state *mdev_state = container_of(vdev, struct mdev_state, vdev);

	mutex_lock(&mdev_state->ops_lock);
	variant_free_log(&mdev_state->variant.log);
	mutex_unlock(&mdev_state->ops_lock);
	return mtty_log_stop(vdev);
}

/* A report must lie within one range that was asked for, as some drivers have it. */
static int variant_log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			      struct iova_bitmap *dirty)
{
	struct mdev_state *mdev_state = container_of(vdev, struct mdev_state, vdev);
	struct variant_log *log = &mdev_state->variant.log;
	u64 last = (u64)iova + length - 1, base = 0, index, end;
	struct variant_range *range = NULL;
	int ret = 0;
	u32 i;

	mutex_lock(&mdev_state->ops_lock);
	if (!log->dirty) {
		ret = READ_ONCE(dma_dirty) ? -EINVAL : mtty_log_read_and_clear(vdev, iova, length, dirty);
		goto unlock;
	}
	for (i = 0; i < log->nranges; i++) {
		range = &log->ranges[i];
		if (range->asked_first <= iova && last <= range->asked_last)
			break;
		base += ((range->last - range->first) >> ilog2(log->page)) + 1;
	}
	if (i == log->nranges) {
		ret = -EINVAL;
		goto unlock;
	}

	index = base + ((iova - range->first) >> ilog2(log->page));
	end = base + ((last - range->first) >> ilog2(log->page)) + 1;
	for (index = find_next_bit(log->dirty, end, index); index < end;
	     index = find_next_bit(log->dirty, end, index + 1)) {
		u64 first = max(range->first + ((index - base) << ilog2(log->page)), range->asked_first);
		u64 stop = min((first | (log->page - 1)), range->asked_last);
		u64 from = max_t(u64, first, iova), to = min_t(u64, stop, last);

		iova_bitmap_set(dirty, from, to - from + 1);
		/* What the report has only a part of stays dirty for the next one. */
		if (from == first && to == stop)
			clear_bit(index, log->dirty);
	}
unlock:
	mutex_unlock(&mdev_state->ops_lock);
	return ret;
}
