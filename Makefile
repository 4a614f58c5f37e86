# make            builds ./train, ./ref_cpu and ./tokenizer
# make help       lists the other targets and the variables
#
# Objects and header dependencies (-MMD) lie in build/. Each program's .cpp is a library to the others and a program of its
# own: NAME.o has no main, NAME.main.o (compiled with -DNAME_MAIN) has one.

# With a CUDA compiler also ./transxssm, and ./train can use the GPU.

PROGRAMS := ref_cpu train tokenizer

BUILD ?= build
BIN   ?= .
TESTS ?=

# ---------------------------------------------------------------------------------------------------------------------
# The compiler and what it can do
# ---------------------------------------------------------------------------------------------------------------------

ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach c,g++ clang++ c++,$(if $(shell command -v $(c)),$(c))) g++)
endif

# accepts,FLAGS: "yes" if the compiler compiles and links a program with these flags without a word.
accepts = $(shell d=$$(mktemp -d) && echo 'int main() { return 0; }' >$$d/a.cpp && \
            $(CXX) -Werror $(1) -o $$d/a $$d/a.cpp >/dev/null 2>&1 && echo yes; rm -rf "$$d")

ifneq ($(filter-out clean help format,$(or $(MAKECMDGOALS),all)),)
# This machine's instructions: -march=native on x86, -mcpu=native on ARM. `make ARCH=` builds for any machine of the kind.
ifeq ($(origin ARCH),undefined)
ARCH := $(if $(filter arm% aarch64,$(shell uname -m)),-mcpu=native,-march=native)
ARCH := $(if $(call accepts,$(ARCH)),$(ARCH))
endif
ifeq ($(origin OPENMP),undefined)
OPENMP := $(if $(call accepts,-fopenmp),1,0)
endif
endif

# -Wno-psabi: vectors wider than the machine's registers are passed between our own functions only.
#
# -ffp-contract=off: a compiler that fuses a*b+c where it likes does so in the vector body of a loop and not in its tail, or
# in one copy of an inlined function and not in the other. Then the bits of a result would depend on how work was cut into
# pieces, and so on the number of threads. Where a fused multiply-add pays, the code asks for it by name.
CXXFLAGS ?= -O3 $(ARCH)
WERROR   ?= -Werror
FLAGS    = -std=c++17 $(CXXFLAGS) -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wpedantic -Wshadow -Wno-psabi $(WERROR) \
           $(if $(filter 1,$(OPENMP)),-fopenmp,-Wno-unknown-pragmas) $(WITH_CUDA)

# ---------------------------------------------------------------------------------------------------------------------
# CUDA
# ---------------------------------------------------------------------------------------------------------------------
# nvcc on the PATH, or where the toolkit installs it; `make CUDA=0` builds without. The code is for this machine's GPU; where
# there is none, for compute capability 8.0 and 9.0, with PTX that the driver translates for later ones. CUDA_ARCH=sm_90 says
# otherwise; several are separated by blanks. Code for 9.0 is made as sm_90a, which has the instruction wgmma (attention, SSD).

ifneq ($(filter-out clean help format,$(or $(MAKECMDGOALS),all)),)
ifneq ($(CUDA),0)
NVCC ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
endif
endif
ifneq ($(NVCC),)
CUDA_HOME ?= $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
ifeq ($(origin CUDA_ARCH),undefined)
CUDA_ARCH := $(patsubst %,sm_%,$(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9.]*$$'))))
endif
CUDA_TARGETS := $(patsubst sm_%,%,$(or $(CUDA_ARCH),sm_80 sm_90))
CUDA_CODE    := $(foreach a,$(CUDA_TARGETS:90=90a),-gencode=arch=compute_$(a),code=sm_$(a)) \
                $(if $(CUDA_ARCH),,$(foreach a,$(lastword $(CUDA_TARGETS)),-gencode=arch=compute_$(a),code=compute_$(a)))
# nvcc splits the file and hands the host's part to CXX, with warnings of its own on code that nvcc wrote: hence no -Wpedantic.
CUDA_FLAGS    = -std=c++17 -O3 $(CUDA_CODE) -ccbin '$(CXX)' -Xcompiler -Wall,-Wextra,-Wshadow \
                $(if $(WERROR),-Werror all-warnings -Xcompiler -Werror)
CUDA_LIBS     = -L$(CUDA_HOME)/lib64 -Wl$(comma)-rpath$(comma)$(CUDA_HOME)/lib64 -lcublasLt -lcudart_static -ldl -lrt -lpthread
CUDA_OBJECT   = $(BUILD)/transxssm.o
WITH_CUDA    := -DWITH_CUDA
PROGRAMS     += transxssm
comma        := ,
endif

# All processors, unless -j was given or several targets are to be made in their order.
ifeq ($(filter -j%,$(MAKEFLAGS))$(filter-out 0,$(MAKELEVEL)),)
ifeq ($(word 2,$(MAKECMDGOALS)),)
MAKEFLAGS += -j$(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
endif
endif

# ---------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------

.PHONY: all run test sanitize mutations oracles bench benchmarks format clean help doctest FORCE
.DELETE_ON_ERROR:
.SUFFIXES:

all: $(PROGRAMS:%=$(BIN)/%)

$(BIN)/ref_cpu:   $(BUILD)/ref_cpu.main.o $(BUILD)/tokenizer.o
$(BIN)/train:     $(BUILD)/train.main.o $(BUILD)/ref_cpu.o $(BUILD)/tokenizer.o $(CUDA_OBJECT)
$(BIN)/tokenizer: $(BUILD)/tokenizer.main.o
$(BIN)/transxssm: $(BUILD)/transxssm.main.o $(BUILD)/ref_cpu.o $(BUILD)/tokenizer.o $(CUDA_OBJECT)

# V=1 shows the commands.
Q := $(if $(V),,@)

$(PROGRAMS:%=$(BIN)/%):
	@echo "  link    $@"
	$(Q)$(CXX) $(FLAGS) -o $@ $^ $(if $(filter $(CUDA_OBJECT),$^),$(CUDA_LIBS)) $(LDFLAGS)

$(BUILD)/%.o: %.cpp $(BUILD)/flags
	@echo "  compile $<"
	$(Q)$(CXX) $(FLAGS) -MMD -MP -c -o $@ $<

# The kernels are compiled once; transxssm.main.o has main() alone.
$(BUILD)/transxssm.o: transxssm.cu $(BUILD)/flags
	@echo "  compile $<"
	$(Q)$(NVCC) $(CUDA_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/transxssm.main.o: transxssm.cu $(BUILD)/flags
	@echo "  compile $< (program)"
	$(Q)$(NVCC) $(CUDA_FLAGS) -DTRANSXSSM_MAIN -MMD -MP -c -o $@ $<

$(BUILD)/%.main.o: %.cpp $(BUILD)/flags
	@echo "  compile $< (program)"
	$(Q)$(CXX) $(FLAGS) -D$(shell echo $* | tr a-z A-Z)_MAIN -MMD -MP -c -o $@ $<

# Everything depends on this file, which changes only when the compiler, its flags or this directory's place do.
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)/test
	@echo "$(CXX) $(FLAGS) $(LDFLAGS) in $(CURDIR) $(if $(NVCC),$(NVCC) $(CUDA_FLAGS))" >$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; echo "$(CXX) $(FLAGS) $(LDFLAGS)"; \
	    echo "CUDA: $(if $(NVCC),$(NVCC) for $(CUDA_TARGETS:%=sm_%)$(if $(CUDA_ARCH),, and PTX: no GPU found),left out)"; fi

# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------

TEST_OBJECTS := $(patsubst %.cpp,$(BUILD)/%.o,$(wildcard test/*.cpp))
DOCTEST_DIR  := build/third_party
# Quoted for the shell: the directory of the repository may have blanks in its name.
TEST_FLAGS   = -isystem $(DOCTEST_DIR) '-DPROGRAM_DIR="$(abspath $(BIN))"' '-DSOURCE_DIR="$(CURDIR)"'

# The system's doctest.h, or a package, or a download into build/third_party: the script says which and checks it.
doctest:
	@sh test/get_doctest.sh '$(CXX)' $(DOCTEST_DIR)

$(TEST_OBJECTS): $(BUILD)/test/%.o: test/%.cpp $(BUILD)/flags | doctest
	@echo "  compile $<"
	$(Q)$(CXX) $(FLAGS) $(TEST_FLAGS) -MMD -MP -c -o $@ $<

$(BUILD)/tests: $(TEST_OBJECTS) $(PROGRAMS:%=$(BUILD)/%.o)
	@echo "  link    $@"
	$(Q)$(CXX) $(FLAGS) -o $@ $^ $(if $(CUDA_OBJECT),$(CUDA_LIBS)) $(LDFLAGS)

# TESTS='-tc=ssd*' runs some of them; the last line counts them.
test: all $(BUILD)/tests
	@$(BUILD)/tests $(TESTS)

# Everything again with the address and undefined-behaviour sanitizers, the programs that the tests start included, and a
# minute of changed tokenizer files.
sanitize:
	@FUZZ_SECONDS=60 $(MAKE) --no-print-directory CUDA=0 BUILD=build/sanitize BIN=build/sanitize \
	    CXXFLAGS='-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all' test

# One planted mistake at a time, each of which the tests must notice and compare must find (four minutes).
mutations: $(BUILD)/tests $(BIN)/ref_cpu
	@CXX='$(CXX)' BUILD='$(BUILD)' REF_CPU='$(BIN)/ref_cpu' CUDA_LINK='$(if $(CUDA_OBJECT),$(CUDA_OBJECT) $(CUDA_LIBS))' sh test/mutations.sh

# The canonical oracles (docs/oracle.md), into build/oracles.
oracles: $(BIN)/ref_cpu
	@sh test/oracles.sh $(BIN)/ref_cpu $(BUILD)/oracles

# ---------------------------------------------------------------------------------------------------------------------
# Everything else
# ---------------------------------------------------------------------------------------------------------------------

run: all
	@$(BIN)/train

bench: all
	@$(BIN)/ref_cpu bench

# Every case of docs/benchmarks.md on this GPU, as figures and plots in build/benchmarks.
benchmarks: $(if $(NVCC),$(BIN)/transxssm)
	@[ -n "$(NVCC)" ] || { echo "benchmarks: needs a CUDA compiler"; exit 1; }
	@mkdir -p $(BUILD)/benchmarks
	@for c in train prefill decode ssd attention gemm; do \
	    $(BIN)/transxssm bench $$c --csv $(BUILD)/benchmarks/$$c.csv --svg $(BUILD)/benchmarks/$$c.svg || exit 1; done

format:
	clang-format -i $(wildcard *.h *.cpp *.cu test/*.h test/*.cpp)

clean:
	rm -rf build $(PROGRAMS) transxssm

help:
	@echo 'make            build ./train, ./ref_cpu and ./tokenizer, and with a CUDA compiler ./transxssm'
	@echo 'make run        build, then ./train: train the tiny preset on this repository, with a sample at the end'
	@echo "make test       build and run the tests; TESTS='-tc=ssd*' runs those whose name matches"
	@echo 'make sanitize   the tests with the address and undefined-behaviour sanitizers'
	@echo 'make mutations  plants mistakes in the reference and checks that the tests and compare notice'
	@echo 'make oracles    write the canonical oracle files into build/oracles'
	@echo 'make bench      ./ref_cpu bench'
	@echo 'make benchmarks ./transxssm bench, case by case, into build/benchmarks'
	@echo 'make format     clang-format every source'
	@echo 'make clean      remove what was built'
	@echo
	@echo 'CXX=clang++     the compiler                OPENMP=0    one thread, no OpenMP'
	@echo "ARCH=           no -march=native            CXXFLAGS=   in place of '-O3 -march=native'"
	@echo 'WERROR=         let warnings pass           V=1         show the commands'
	@echo 'CUDA=0          without the CUDA engine     CUDA_ARCH=  sm_90, say: the GPUs to compile for'

-include $(wildcard $(BUILD)/*.d $(BUILD)/test/*.d)
