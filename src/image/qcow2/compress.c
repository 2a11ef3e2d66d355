/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Unpacks the compressed clusters of qcow2: raw deflate, or zstd.
 *
 * The bytes come from an image that nobody vouches for.  Both libraries decode straight into the
 * caller's buffer, in one pass: what a stream says of its window or its size allocates nothing.
 * How long the packed data is is known to sectors of 512 bytes only, so whatever follows it in
 * the input belongs to somebody else and is not looked at.
 */
#include "image/qcow2/qcow2.h"
#include <errno.h>
#include <limits.h>
#include <zlib.h>
#include <zstd.h>

/* QEMU writes with a window of 4 KiB; the largest window reads every stream. */
#define DEFLATE_WINDOW_BITS (-15)

static int unpack_deflate(const void *in, size_t in_bytes, void *out, size_t out_bytes)
{
	z_stream stream = {
	        .next_in = (Bytef *)(uintptr_t)in,
	        .avail_in = (uInt)ox_min(in_bytes, (size_t)UINT_MAX),
	        .next_out = out,
	        .avail_out = (uInt)out_bytes,
	};

	if (out_bytes > UINT_MAX || inflateInit2(&stream, DEFLATE_WINDOW_BITS) != Z_OK)
		return -EIO;
	/* Not by what it answers: the end mark may be missing, and what stands in its place is then
	 * judged, although it belongs to somebody else.  The cluster is whole or it is not. */
	(void)inflate(&stream, Z_FINISH);
	inflateEnd(&stream);
	return stream.avail_out == 0 ? 0 : -EIO;
}

/* A cluster may be made of several frames, some of them empty or of the kind that is skipped.
 * Frames are decoded one by one because that needs no window of the decoder's own, which would be
 * as large as the frame's header says. */
static int unpack_zstd(const void *in, size_t in_bytes, void *out, size_t out_bytes)
{
	ZSTD_DCtx *context = ZSTD_createDCtx();
	size_t at = 0, done = 0;

	while (context && done < out_bytes) {
		const uint8_t *frame = (const uint8_t *)in + at;
		size_t taken = ZSTD_findFrameCompressedSize(frame, in_bytes - at);
		size_t made;

		if (ZSTD_isError(taken) || taken == 0)
			break;
		made = ZSTD_decompressDCtx(context, (uint8_t *)out + done, out_bytes - done, frame,
		                           taken);
		if (ZSTD_isError(made))
			break;
		at += taken;
		done += made;
	}
	ZSTD_freeDCtx(context);
	return done == out_bytes ? 0 : -EIO;
}

int qcow2_decompress(unsigned type, const void *in, size_t in_bytes, void *out, size_t out_bytes)
{
	switch (type) {
	case QCOW2_COMPRESSION_DEFLATE:
		return unpack_deflate(in, in_bytes, out, out_bytes);
	case QCOW2_COMPRESSION_ZSTD:
		return unpack_zstd(in, in_bytes, out, out_bytes);
	default:
		return -EIO;
	}
}
