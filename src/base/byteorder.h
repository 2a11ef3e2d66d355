/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Fixed-order integers in unaligned bytes.
 */
#ifndef OX_BASE_BYTEORDER_H
#define OX_BASE_BYTEORDER_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

#define OX_DEFINE_ORDER(bits)                                         \
	static inline uint##bits##_t ox_get_le##bits(const void *p)   \
	{                                                             \
		uint##bits##_t v;                                     \
		memcpy(&v, p, sizeof(v));                             \
		return le##bits##toh(v);                              \
	}                                                             \
	static inline uint##bits##_t ox_get_be##bits(const void *p)   \
	{                                                             \
		uint##bits##_t v;                                     \
		memcpy(&v, p, sizeof(v));                             \
		return be##bits##toh(v);                              \
	}                                                             \
	static inline void ox_put_le##bits(void *p, uint##bits##_t v) \
	{                                                             \
		v = htole##bits(v);                                   \
		memcpy(p, &v, sizeof(v));                             \
	}                                                             \
	static inline void ox_put_be##bits(void *p, uint##bits##_t v) \
	{                                                             \
		v = htobe##bits(v);                                   \
		memcpy(p, &v, sizeof(v));                             \
	}

OX_DEFINE_ORDER(16)
OX_DEFINE_ORDER(32)
OX_DEFINE_ORDER(64)
#undef OX_DEFINE_ORDER

#endif
