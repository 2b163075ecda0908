/* crc32c, Castagnoli's checksum: by instructions where the machine has them, three streams at a time; by tables elsewhere.
 *
 * Call choose_crc once; then update_crc(~0u, bytes, count), inverted, is the checksum.
 */
#ifndef S4V_CRC32C_H
#define S4V_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

#define POLYNOMIAL 0x82f63b78u /* Castagnoli's, reflected */
#define STREAM_BYTES 512       /* of each of three streams, whose instructions do not wait for each other */

static uint32_t byte_table[8][256];
static uint32_t skip_table[4][256]; /* what STREAM_BYTES zeros make of a register, byte by byte of it */

static uint32_t crc_by_table(uint32_t crc, const uint8_t *bytes, size_t count) {
    for (; count >= 8; bytes += 8, count -= 8) {
        uint32_t low = crc ^ ((uint32_t)bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 |
                              (uint32_t)bytes[3] << 24);
        crc = byte_table[7][low & 255] ^ byte_table[6][low >> 8 & 255] ^ byte_table[5][low >> 16 & 255] ^
              byte_table[4][low >> 24] ^ byte_table[3][bytes[4]] ^ byte_table[2][bytes[5]] ^ byte_table[1][bytes[6]] ^
              byte_table[0][bytes[7]];
    }
    while (count--)
        crc = crc >> 8 ^ byte_table[0][(crc ^ *bytes++) & 255];
    return crc;
}

static void fill_tables(void) {
    static const uint8_t zeros[STREAM_BYTES];
    for (uint32_t value = 0; value < 256; value++) {
        uint32_t crc = value;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        byte_table[0][value] = crc;
    }
    for (uint32_t value = 0; value < 256; value++)
        for (int place = 1; place < 8; place++) {
            uint32_t before = byte_table[place - 1][value];
            byte_table[place][value] = before >> 8 ^ byte_table[0][before & 255];
        }
    for (int place = 0; place < 4; place++)
        for (uint32_t value = 0; value < 256; value++)
            skip_table[place][value] = crc_by_table(value << 8 * place, zeros, STREAM_BYTES);
}

static inline uint32_t skip_stream(uint32_t crc) {
    return skip_table[0][crc & 255] ^ skip_table[1][crc >> 8 & 255] ^ skip_table[2][crc >> 16 & 255] ^
           skip_table[3][crc >> 24];
}

#if defined(__x86_64__)
#define HARDWARE "sse4.2"
#define HARDWARE_TARGET __attribute__((target("sse4.2")))
#define CRC_WORD(crc, word) ((uint32_t)__builtin_ia32_crc32di((crc), (word)))
#define CRC_BYTE(crc, byte) __builtin_ia32_crc32qi((crc), (byte))
static int has_hardware(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("sse4.2");
}
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#define HARDWARE "armv8"
#define HARDWARE_TARGET
#define CRC_WORD(crc, word) __crc32cd((crc), (word))
#define CRC_BYTE(crc, byte) __crc32cb((crc), (byte))
static int has_hardware(void) { return 1; }
#endif

#ifdef HARDWARE
static inline uint64_t load_word(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

HARDWARE_TARGET static uint32_t crc_by_hardware(uint32_t crc, const uint8_t *bytes, size_t count) {
    for (; count >= 3 * STREAM_BYTES; bytes += 3 * STREAM_BYTES, count -= 3 * STREAM_BYTES) {
        uint32_t second = 0, third = 0;
        for (size_t place = 0; place < STREAM_BYTES; place += 8) {
            crc = CRC_WORD(crc, load_word(bytes + place));
            second = CRC_WORD(second, load_word(bytes + STREAM_BYTES + place));
            third = CRC_WORD(third, load_word(bytes + 2 * STREAM_BYTES + place));
        }
        crc = skip_stream(skip_stream(crc) ^ second) ^ third;
    }
    for (; count >= 8; bytes += 8, count -= 8)
        crc = CRC_WORD(crc, load_word(bytes));
    while (count--)
        crc = CRC_BYTE(crc, *bytes++);
    return crc;
}
#endif

static uint32_t (*update_crc)(uint32_t, const uint8_t *, size_t) = crc_by_table;
static const char *crc_kind = "table";

static void choose_crc(void) {
    fill_tables();
#ifdef HARDWARE
    if (has_hardware()) {
        update_crc = crc_by_hardware;
        crc_kind = HARDWARE;
    }
#endif
}

#endif
