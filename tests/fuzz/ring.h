/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Bytes become a virtqueue in guest memory, and what the device does with it.
 *
 * Input: 16 bytes of set-up (struct ring_setup), the number of steps (a byte) and two bytes for
 * each, then guest memory: rings and descriptors from address 0 on.  Steps are what a device does
 * (pop, push, flush, notifications) and what a hostile driver does meanwhile (pokes).
 *
 * Checked beside the sanitizers: every buffer of a chain lies in guest memory, sums are right,
 * no more is in flight than the ring has.
 */
#ifndef OX_TESTS_FUZZ_RING_H
#define OX_TESTS_FUZZ_RING_H

#include <stddef.h>
#include <stdint.h>

struct ring_setup {
	uint8_t flags; /* RING_* */
	uint8_t size;  /* split: 2^(size % 9); packed: 1 + size */
	uint16_t avail_index, used_index;
	uint16_t desc_at, driver_at, device_at; /* in units of 16 bytes */
	uint16_t inflight_bytes;                /* of the input, if RING_INFLIGHT_GIVEN */
	uint16_t spare;
};
#define RING_PACKED         1u
#define RING_EVENT_IDX      2u
#define RING_INDIRECT       4u
#define RING_LOG            8u
#define RING_INFLIGHT       16u /* a fresh region */
#define RING_INFLIGHT_GIVEN 32u /* its content is the input's */

void fuzz_ring(const uint8_t *data, size_t size, uint8_t set, uint8_t clear);

#endif
