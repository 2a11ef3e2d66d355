/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Put in front of each source of src/virtio for test_inflight: see ox_persist() in vring.h.
 */
#ifndef TESTS_VIRTIO_STORE_POINT_H
#define TESTS_VIRTIO_STORE_POINT_H

void test_store_point(void);
#define OX_STORE_POINT test_store_point

#endif
