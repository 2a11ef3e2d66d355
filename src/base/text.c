/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Numbers and words as people write them.  Nothing here depends on the locale: "1.5G" means
 * the same for everybody.
 */
#include "base/text.h"
#include "base/base.h"
#include <stdio.h>
#include <string.h>

static int digit_value(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	if (c >= 'A' && c <= 'F')
		return c - 'A' + 10;
	return 99;
}

/* Digits of a base from *text on, which moves behind them; how many there were, -1: more than
 * 64 bits. */
static int take_digits(const char **text, unsigned base, uint64_t *out)
{
	const char *p = *text;
	uint64_t value = 0;

	for (; (unsigned)digit_value(*p) < base; p++)
		if (__builtin_mul_overflow(value, base, &value) ||
		    __builtin_add_overflow(value, (uint64_t)digit_value(*p), &value))
			return -1;
	*out = value;
	base = (unsigned)(p - *text);
	*text = p;
	return (int)base;
}

/* The factor of a suffix letter, 0: it is none. */
static uint64_t suffix_factor(char c)
{
	switch (c) {
	case 'b':
	case 'B':
		return 1;
	case 'k':
	case 'K':
		return (uint64_t)1 << 10;
	case 'm':
	case 'M':
		return (uint64_t)1 << 20;
	case 'g':
	case 'G':
		return (uint64_t)1 << 30;
	case 't':
	case 'T':
		return (uint64_t)1 << 40;
	case 'p':
	case 'P':
		return (uint64_t)1 << 50;
	case 'e':
	case 'E':
		return (uint64_t)1 << 60;
	}
	return 0;
}

bool ox_parse_size(const char *text, uint64_t unit, uint64_t *out)
{
	uint64_t whole = 0, numerator = 0, denominator = 1, factor;
	const char *p = text;
	bool hex = false;
	int digits;

	while (*p == ' ' || (*p >= '\t' && *p <= '\r'))
		p++;
	if (*p == '+')
		p++;
	if (p[0] == '0' && (p[1] == 'x' || p[1] == 'X')) {
		p += 2;
		hex = true;
	}
	digits = take_digits(&p, hex ? 16 : 10, &whole);
	if (digits < 0 || (hex && digits == 0))
		return false;
	if (*p == '.' && !hex) {
		const char *point = p++;

		for (; *p >= '0' && *p <= '9'; p++) {
			/* Digits behind the 18th change no byte even of exbibytes by much. */
			if (p - point > 18)
				continue;
			numerator = numerator * 10 + (uint64_t)(*p - '0');
			denominator *= 10;
		}
		if (digits == 0 && p == point + 1)
			return false;
	} else if (digits == 0) {
		return false;
	}
	factor = unit;
	if (*p) {
		factor = suffix_factor(*p++);
		if (!factor || *p)
			return false;
	}
	/* Half a byte is a mistake, not a size. */
	if (factor == 1 && numerator)
		return false;
	if (__builtin_mul_overflow(whole, factor, &whole))
		return false;
	/* To the nearest byte.  Below 2^60 * 10^18: no overflow of 128 bits. */
	numerator =
	        (uint64_t)(((unsigned __int128)numerator * factor + denominator / 2) / denominator);
	if (__builtin_add_overflow(whole, numerator, &whole) || whole > INT64_MAX)
		return false;
	*out = whole;
	return true;
}

bool ox_parse_uint(const char *text, uint64_t min, uint64_t max, uint64_t *out)
{
	uint64_t value;

	if (take_digits(&text, 10, &value) <= 0 || *text || value < min || value > max)
		return false;
	*out = value;
	return true;
}

char *ox_format_size(uint64_t bytes, char *buf, size_t size)
{
	static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
	double value = (double)bytes;
	unsigned unit = 0;

	/* What three digits cannot say is said in the next unit: 1000 is "0.977 KiB". */
	while (value >= 999.5 && unit + 1 < OX_ARRAY_SIZE(units)) {
		value /= 1024;
		unit++;
	}
	snprintf(buf, size, "%0.3g %s", value, units[unit]);
	return buf;
}

static char lower(char c)
{
	return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

#define WORD_MAX 64

/* Insertions, deletions, replacements and swapped neighbours that lead from a to b.  Three rows
 * of the usual table; both are shorter than WORD_MAX. */
static unsigned edit_distance(const char *a, const char *b)
{
	unsigned rows[3][WORD_MAX + 1];
	unsigned *before = rows[0], *last = rows[1], *now = rows[2];
	size_t na = strlen(a), nb = strlen(b);

	memset(before, 0, sizeof(rows[0]));
	for (size_t j = 0; j <= nb; j++)
		last[j] = (unsigned)j;
	for (size_t i = 1; i <= na; i++) {
		unsigned *recycled = before;

		now[0] = (unsigned)i;
		for (size_t j = 1; j <= nb; j++) {
			char ca = lower(a[i - 1]), cb = lower(b[j - 1]);
			unsigned best = last[j - 1] + (ca != cb);

			best = ox_min(best, last[j] + 1);
			best = ox_min(best, now[j - 1] + 1);
			if (i > 1 && j > 1 && ca == lower(b[j - 2]) && lower(a[i - 2]) == cb)
				best = ox_min(best, before[j - 2] + 1);
			now[j] = best;
		}
		before = last;
		last = now;
		now = recycled;
	}
	return last[nb];
}

const char *ox_nearest_word(const char *word, const char *const *candidates)
{
	size_t length = strlen(word);
	/* A third of the letters may be wrong; in a very short word, one. */
	unsigned limit = length < 4 ? 1 : ox_max((unsigned)(length / 3), 2u);
	const char *best = NULL;

	if (length >= WORD_MAX)
		return NULL;
	for (; *candidates; candidates++) {
		unsigned distance;

		if (strlen(*candidates) >= WORD_MAX)
			continue;
		distance = edit_distance(word, *candidates);
		if (distance < limit || (distance == limit && !best)) {
			limit = distance;
			best = *candidates;
		}
	}
	return best;
}
