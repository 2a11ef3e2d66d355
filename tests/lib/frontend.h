/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * A vhost-user front end: it plays the virtual machine's side, so that tests and benchmarks can
 * drive any vhost-user-blk back end without a guest.
 *
 * Three layers, each usable by itself:
 *  - the connection: messages of any content, the ordinary ones with their replies, a start-up
 *    in QEMU's order (fe_start) made of steps that hostile tests call in another;
 *  - guest memory: memfd regions at chosen guest-physical addresses; region 0 holds the rings;
 *  - queues: the driver's side of split and packed rings (fe_split.c, fe_packed.c), and
 *    virtio-blk requests on top (fe_blk.c).
 *
 * Nothing here trusts the back end more than a test needs: replies have a time limit, a used
 * element that names no request in flight is counted in fe_vq.bogus.  One thread uses a queue;
 * the connection belongs to one thread.  Functions answer 0 or -errno; fe->error tells more.
 *
 * It shares no code with src/virtio or src/export: the two sides check each other.
 */
#ifndef OX_TESTS_FRONTEND_H
#define OX_TESTS_FRONTEND_H

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* --- numbers of the protocol (QEMU docs/interop/vhost-user.rst) ----------------------------- */

enum fe_request {
	FE_GET_FEATURES = 1,
	FE_SET_FEATURES = 2,
	FE_SET_OWNER = 3,
	FE_RESET_OWNER = 4,
	FE_SET_MEM_TABLE = 5,
	FE_SET_LOG_BASE = 6,
	FE_SET_LOG_FD = 7,
	FE_SET_VRING_NUM = 8,
	FE_SET_VRING_ADDR = 9,
	FE_SET_VRING_BASE = 10,
	FE_GET_VRING_BASE = 11,
	FE_SET_VRING_KICK = 12,
	FE_SET_VRING_CALL = 13,
	FE_SET_VRING_ERR = 14,
	FE_GET_PROTOCOL_FEATURES = 15,
	FE_SET_PROTOCOL_FEATURES = 16,
	FE_GET_QUEUE_NUM = 17,
	FE_SET_VRING_ENABLE = 18,
	FE_SET_BACKEND_REQ_FD = 21,
	FE_GET_CONFIG = 24,
	FE_SET_CONFIG = 25,
	FE_GET_INFLIGHT_FD = 31,
	FE_SET_INFLIGHT_FD = 32,
	FE_RESET_DEVICE = 34,
	FE_GET_MAX_MEM_SLOTS = 36,
	FE_ADD_MEM_REG = 37,
	FE_REM_MEM_REG = 38,
	FE_SET_STATUS = 39,
	FE_GET_STATUS = 40,
	FE_REQUEST_MAX = 44,
};
#define FE_BACKEND_CONFIG_CHANGE 2

#define FE_VERSION    1u
#define FE_REPLY      (1u << 2)
#define FE_NEED_REPLY (1u << 3)

#define FE_P_MQ                  (1ull << 0)
#define FE_P_LOG_SHMFD           (1ull << 1)
#define FE_P_REPLY_ACK           (1ull << 3)
#define FE_P_BACKEND_REQ         (1ull << 5)
#define FE_P_CONFIG              (1ull << 9)
#define FE_P_INFLIGHT_SHMFD      (1ull << 12)
#define FE_P_RESET_DEVICE        (1ull << 13)
#define FE_P_CONFIGURE_MEM_SLOTS (1ull << 15)
#define FE_P_STATUS              (1ull << 16)

#define FE_F_LOG_ALL           (1ull << 26)
#define FE_F_INDIRECT          (1ull << 28)
#define FE_F_EVENT_IDX         (1ull << 29)
#define FE_F_PROTOCOL_FEATURES (1ull << 30)
#define FE_F_VERSION_1         (1ull << 32)
#define FE_F_PACKED            (1ull << 34)
#define FE_F_BLK(bit)          (1ull << (VIRTIO_BLK_F_##bit))

/* What a front end asks for by default: all that Linux's virtio_blk driver uses, split rings. */
#define FE_FEATURES_DEFAULT                                                                 \
	(FE_F_INDIRECT | FE_F_EVENT_IDX | FE_F_PROTOCOL_FEATURES | FE_F_VERSION_1 |         \
	 FE_F_BLK(SEG_MAX) | FE_F_BLK(SIZE_MAX) | FE_F_BLK(BLK_SIZE) | FE_F_BLK(TOPOLOGY) | \
	 FE_F_BLK(FLUSH) | FE_F_BLK(CONFIG_WCE) | FE_F_BLK(MQ) | FE_F_BLK(DISCARD) |        \
	 FE_F_BLK(WRITE_ZEROES) | FE_F_BLK(RO))
#define FE_PROTOCOL_DEFAULT                                                                \
	(FE_P_MQ | FE_P_REPLY_ACK | FE_P_BACKEND_REQ | FE_P_CONFIG | FE_P_INFLIGHT_SHMFD | \
	 FE_P_RESET_DEVICE | FE_P_CONFIGURE_MEM_SLOTS | FE_P_LOG_SHMFD)

struct fe_msg {
	uint32_t request, flags, size; /* as on the wire, little endian */
	union {
		uint64_t u64;
		struct {
			uint32_t index, num;
		} state;
		struct {
			uint32_t index, flags;
			uint64_t desc, used, avail, log;
		} addr;
		struct {
			uint32_t count, padding;
			struct fe_wire_region {
				uint64_t gpa, size, uva, offset;
			} region[8];
		} memory;
		struct {
			uint64_t padding;
			struct fe_wire_region region;
		} one_region;
		struct {
			uint32_t offset, size, flags;
			uint8_t bytes[1024];
		} config;
		struct {
			uint64_t mmap_size, mmap_offset;
			uint16_t queues, queue_size;
		} inflight;
		struct {
			uint64_t size, offset;
		} log;
		uint8_t raw[4096];
	} u;
} __attribute__((packed));
#define FE_HEADER 12u

/* --- memory ---------------------------------------------------------------------------------- */

#define FE_MAX_REGIONS 600

struct fe_region {
	uint64_t gpa, size, offset; /* offset: in the descriptor */
	uint64_t uva;               /* what the back end is told as the user address */
	int fd;
	char *host;
	bool known; /* the back end was told */
};

/* --- queues ---------------------------------------------------------------------------------- */

struct fe;

/* A buffer in guest memory. */
struct fe_buf {
	uint64_t gpa;
	uint32_t len;
};

/* Most buffers of a chain that fe_vq_add() takes. */
#define FE_MAX_CHAIN 160u

struct fe_slot {
	void *cookie;
	uint16_t descs; /* ring descriptors that it took; 0: not in flight */
	uint16_t next;  /* of the free list */
};

struct fe_vq {
	struct fe *fe;
	unsigned index;
	uint16_t size;
	bool packed, event_idx, indirect;
	int kick_fd, call_fd, err_fd;
	uint64_t desc_gpa, driver_gpa, device_gpa; /* descriptor, driver and device areas */
	uint64_t table_gpa;                        /* indirect tables, FE_MAX_CHAIN each */
	uint64_t header_gpa;                       /* FE_HEADER_STRIDE for each id */
	/* The same, mapped here. */
	union {
		struct vring_desc *desc;
		struct vring_packed_desc *pdesc;
	};
	union {
		struct vring_avail *avail;
		struct vring_packed_desc_event *driver_event;
	};
	union {
		struct vring_used *used;
		struct vring_packed_desc_event *device_event;
	};
	char *table, *header;

	struct fe_slot *slot;
	uint16_t free_head;  /* ids; split: also descriptors */
	uint16_t free_count; /* descriptors */
	uint16_t in_flight;  /* chains */
	uint16_t next_avail; /* split: free running; packed: position */
	uint16_t last_used;
	bool avail_wrap, used_wrap;         /* packed */
	uint16_t published;                 /* next_avail at the last fe_vq_publish() */
	uint16_t kicked;                    /* next_avail at the last fe_vq_should_kick() */
	bool kicked_wrap;                   /* packed: avail_wrap at that moment */
	struct vring_packed_desc *deferred; /* packed: first head of the batch, */
	uint16_t deferred_flags;            /* and the flags that make it visible */
	bool started;
	uint32_t start_base; /* what SET_VRING_BASE last said */
	unsigned bogus;      /* used elements that named nothing in flight */
	uint64_t kicks;
};
#define FE_HEADER_STRIDE 64u

/* Adds a chain: `out` buffers that the device reads, then `in` that it writes.  Through the
 * id's indirect table if the queue uses them and there is more than one buffer.  The id, or
 * -ENOSPC.  The device sees it after fe_vq_publish(). */
int fe_vq_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *cookie);
/* The id that fe_vq_add() will take next; -ENOSPC. */
int fe_vq_next_id(const struct fe_vq *vq);
/* Makes all added chains visible.  True if the device wants a kick for them. */
bool fe_vq_publish(struct fe_vq *vq);
/* Publishes, and kicks if the device asked for it. */
void fe_vq_submit(struct fe_vq *vq);
void fe_vq_kick(struct fe_vq *vq);
/* Takes a completion: the id or -EAGAIN.  *cookie and *len may be NULL. */
int fe_vq_pop(struct fe_vq *vq, void **cookie, uint32_t *len);
/* Device-to-driver notifications. enable answers true if something has come already. */
bool fe_vq_enable_call(struct fe_vq *vq);
void fe_vq_disable_call(struct fe_vq *vq);
/* Sleeps on the call eventfd; -ETIMEDOUT. */
int fe_vq_wait(struct fe_vq *vq, int timeout_ms);
/* Everything back to empty rings, as a driver does after a device reset. */
void fe_vq_reset(struct fe_vq *vq);
/* The value for SET_VRING_BASE when the front end takes over from a dead back end: split: the
 * used index in memory; packed: what it said at the last start, for there is no such index. */
uint32_t fe_vq_restart_base(const struct fe_vq *vq);

/* For the two ring kinds' files. */
int fe_split_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *c);
bool fe_split_publish(struct fe_vq *vq);
int fe_split_pop(struct fe_vq *vq, void **cookie, uint32_t *len);
bool fe_split_enable_call(struct fe_vq *vq);
void fe_split_disable_call(struct fe_vq *vq);
void fe_split_reset(struct fe_vq *vq);
int fe_packed_add(struct fe_vq *vq, const struct fe_buf *bufs, unsigned out, unsigned in, void *c);
bool fe_packed_publish(struct fe_vq *vq);
int fe_packed_pop(struct fe_vq *vq, void **cookie, uint32_t *len);
bool fe_packed_enable_call(struct fe_vq *vq);
void fe_packed_disable_call(struct fe_vq *vq);
void fe_packed_reset(struct fe_vq *vq);

/* --- the front end --------------------------------------------------------------------------- */

struct fe_options {
	const char *path; /* of the back end's socket */
	/* Wanted; what the back end does not offer is left out, see fe.features. */
	uint64_t features, protocol_features;
	unsigned queues; /* default 1 */
	uint16_t queue_size;
	uint64_t memory;      /* bytes of data memory, in `regions` regions of equal size */
	unsigned regions;     /* default 1; adjacent in guest addresses, not in ours */
	int timeout_ms;       /* for replies; default 20 s */
	bool no_reply_ack;    /* do not ask for acknowledgements although negotiated */
	bool keep_table_mode; /* SET_MEM_TABLE although memory slots were negotiated */
};

struct fe {
	struct fe_options options;
	int sock;
	uint64_t offered, features;                   /* as negotiated */
	uint64_t offered_protocol, protocol_features; /* as negotiated */
	uint64_t queue_num, mem_slots;                /* what the back end said */
	int backend_fd;                               /* our end of the BACKEND_REQ channel */
	int inflight_fd;
	uint64_t inflight_size, inflight_offset;
	int log_fd;
	uint8_t *log; /* mapped dirty bitmap */
	uint64_t log_size;
	struct fe_region region[FE_MAX_REGIONS];
	unsigned region_count;
	uint64_t data_gpa; /* of options.memory */
	struct fe_vq *vq;  /* options.queues of them */
	uint64_t capacity; /* bytes, read from the configuration by fe_start() */
	/* Hang up instead of sending message number `fuse` (0: the next one; -1: never); with
	 * fuse_bytes > 0 only after that many bytes of it. */
	int fuse;
	unsigned fuse_bytes;
	char error[256];
};
#define FE_RING_GPA 0x10000000ull /* region 0 */
#define FE_DATA_GPA 0x40000000ull

/* Defaults: FE_FEATURES_DEFAULT, one queue of 128 entries, 16 MiB. */
void fe_options_init(struct fe_options *options, const char *path);
/* Memory and queues; no connection yet.  Ends the process when there is no memory. */
struct fe *fe_new(const struct fe_options *options);
void fe_free(struct fe *fe); /* NULL is allowed */

int fe_connect(struct fe *fe);
/* Closes the socket and channel; rings, memory and the inflight region stay. */
void fe_disconnect(struct fe *fe);
/* GET_FEATURES to SET_FEATURES. */
int fe_negotiate(struct fe *fe);
int fe_set_features(struct fe *fe, uint64_t features);
/* Tells all regions, one by one with memory slots, else as a table (8 at most). */
int fe_send_memory(struct fe *fe);
int fe_queue_start(struct fe *fe, unsigned index, uint32_t base);
int fe_queue_enable(struct fe *fe, unsigned index, bool on);
/* GET_VRING_BASE: the queue stops; base may be NULL. */
int fe_queue_stop(struct fe *fe, unsigned index, uint32_t *base);
/* The whole start-up as QEMU does it: connect, negotiate, configuration, inflight (if
 * negotiated; an fd that is there already is given back), memory, queues, enable. */
int fe_start(struct fe *fe);
/* All started queues stop. */
int fe_stop(struct fe *fe);
/* After the back end died: fe_disconnect and fe_start with each queue's restart base. */
int fe_restart(struct fe *fe);

int fe_get_config(struct fe *fe, uint32_t offset, uint32_t size, void *out);
int fe_set_config(struct fe *fe, uint32_t offset, uint32_t size, const void *bytes);
int fe_get_inflight(struct fe *fe, uint16_t queues, uint16_t queue_size);
int fe_set_inflight(struct fe *fe);
/* A dirty bitmap that covers all guest memory: SET_LOG_BASE. */
int fe_set_log(struct fe *fe);
/* Tells a queue's addresses, with logging of the used ring or without. */
int fe_set_vring_addr(struct fe *fe, unsigned index, bool log);
/* Waits for a message on the backend channel; its request number in *request. */
int fe_backend_message(struct fe *fe, int timeout_ms, uint32_t *request);
int fe_get_status(struct fe *fe, uint64_t *status);
int fe_set_status(struct fe *fe, uint64_t status);

/* A region that the back end does not know yet; -1 as fd: a new memfd. Its index, or -errno. */
int fe_region_new(struct fe *fe, uint64_t gpa, uint64_t size, int fd, uint64_t offset);
int fe_add_slot(struct fe *fe, unsigned region);
/* REM_MEM_REG, and the region is forgotten here too. */
int fe_remove_slot(struct fe *fe, unsigned region);
/* Our address of guest memory; NULL unless [gpa, gpa + len) is in one region. */
void *fe_host(struct fe *fe, uint64_t gpa, uint64_t len);
/* Copies between our memory and guest memory, across regions; false: outside. */
bool fe_mem_read(struct fe *fe, uint64_t gpa, void *buf, size_t bytes);
bool fe_mem_write(struct fe *fe, uint64_t gpa, const void *buf, size_t bytes);

/* --- messages -------------------------------------------------------------------------------- */

int fe_send_raw(struct fe *fe, const void *bytes, size_t count, const int *fds, unsigned nfds);
/* Sends header and payload; flags beyond the version, e.g. FE_NEED_REPLY. */
int fe_send(struct fe *fe, uint32_t request, uint32_t flags, const void *payload, uint32_t size,
            const int *fds, unsigned nfds);
/* Receives a message and at most one descriptor (*fd -1 if none; fd may be NULL).
 * -ECONNRESET: the back end hung up; -ETIMEDOUT. */
int fe_recv(struct fe *fe, struct fe_msg *msg, int *fd);
/* Sends, and asks for an acknowledgement if that is negotiated: -EIO if it said no. */
int fe_send_ack(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds,
                unsigned nfds);
/* Sends and receives the reply of the same number. */
int fe_call(struct fe *fe, uint32_t request, const void *payload, uint32_t size, const int *fds,
            unsigned nfds, struct fe_msg *reply, int *reply_fd);
int fe_get_u64(struct fe *fe, uint32_t request, uint64_t *value);
/* Is the connection closed by the other side?  Waits up to timeout_ms for it. */
bool fe_hung_up(struct fe *fe, int timeout_ms);

/* --- virtio-blk ------------------------------------------------------------------------------ */

/* Where an id's header and status byte are. */
uint64_t fe_blk_header_gpa(const struct fe_vq *vq, unsigned id);
uint64_t fe_blk_status_gpa(const struct fe_vq *vq, unsigned id);
volatile uint8_t *fe_blk_status(const struct fe_vq *vq, unsigned id);

/* Adds a request: header, the data buffers (device reads or writes them by type), status.  The
 * id or -ENOSPC; not yet published. */
int fe_blk_add(struct fe_vq *vq, uint32_t type, uint64_t sector, const struct fe_buf *data,
               unsigned count, void *cookie);
/* One request to its end: the status byte, or -ETIMEDOUT.  Nothing else is in flight. */
int fe_blk_do(struct fe_vq *vq, uint32_t type, uint64_t sector, const struct fe_buf *data,
              unsigned count);
int fe_blk_read(struct fe_vq *vq, uint64_t offset, uint64_t gpa, uint32_t len);
int fe_blk_write(struct fe_vq *vq, uint64_t offset, uint64_t gpa, uint32_t len);
int fe_blk_flush(struct fe_vq *vq);
/* Range commands: DISCARD, WRITE_ZEROES, SECURE_ERASE; the range lives in the header's area. */
int fe_blk_range(struct fe_vq *vq, uint32_t type, uint64_t offset, uint64_t len, uint32_t flags);
/* Takes completions until none is in flight: their number, or -ETIMEDOUT.  Each one's cookie
 * (a uint8_t *, may be NULL) gets its status byte. */
int fe_blk_drain(struct fe_vq *vq, int timeout_ms);

/* Content that depends on seed and position: what a test writes and expects. */
void fe_pattern(void *buf, size_t bytes, uint64_t seed);

#endif
