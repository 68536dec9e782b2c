// Keeps the maximum of SIDE x SIDE pixels, for each of WIDTH channels. Rows and columns that fill no such square are left
// out. Pixels come in bit-planes, most significant first (SERIAL = 1: a beat has WIDTH bits, a pixel BITS beats), or whole
// (SERIAL = 0: a beat has WIDTH x BITS bits). The maximum so far of each square of a row of squares is kept in memory.
module pool #(
  parameter WIDTH = 1,
  parameter BITS = 4,
  parameter SERIAL = 1,
  parameter COLUMNS = 14,
  parameter ROWS = 14,
  parameter SIDE = 2
) (
  input wire clk,
  input wire rst,
  input wire in_valid,
  input wire [(SERIAL ? WIDTH : WIDTH*BITS)-1:0] in_data,
  output reg out_valid,
  output reg [(SERIAL ? WIDTH : WIDTH*BITS)-1:0] out_data
);
  localparam BEATS = SERIAL ? BITS : 1;
  localparam BUS = SERIAL ? WIDTH : WIDTH * BITS;
  localparam SIZE = (COLUMNS / SIDE) * BEATS;
  localparam AB = SIZE > 1 ? $clog2(SIZE) : 1;
  localparam BB = BEATS > 1 ? $clog2(BEATS) : 1;
  localparam [BB-1:0] LAST = BEATS[BB-1:0] - 1'b1;

  reg [BB-1:0] beat;
  reg [15:0] column, row;       // of the image
  reg [7:0] across, along;      // within the square
  reg [AB-1:0] base;            // of the square's memory
  wire last = beat == LAST;
  wire used = column < (COLUMNS / SIDE) * SIDE && row < (ROWS / SIDE) * SIDE;
  wire [AB-1:0] place = base + {{(AB > BB ? AB - BB : 0){1'b0}}, beat};

  always @(posedge clk)
    if (rst) begin
      beat <= 0;
      column <= 0;
      row <= 0;
      across <= 0;
      along <= 0;
      base <= 0;
    end else if (in_valid) begin
      beat <= last ? 0 : beat + 1'b1;
      if (last) begin
        column <= column == COLUMNS - 1 ? 0 : column + 1'b1;
        across <= across == SIDE - 1 || column == COLUMNS - 1 ? 0 : across + 1'b1;
        if (column == COLUMNS - 1) begin
          base <= 0;
          row <= row == ROWS - 1 ? 0 : row + 1'b1;
          along <= along == SIDE - 1 || row == ROWS - 1 ? 0 : along + 1'b1;
        end else if (across == SIDE - 1 && column < (COLUMNS / SIDE - 1) * SIDE + SIDE - 1) base <= base + BEATS[AB-1:0];
      end
    end

  reg [BUS-1:0] memory [0:SIZE-1];
  wire first = across == 0 && along == 0;
  wire [BUS-1:0] old = memory[place] & {BUS{~first}};
  wire [BUS-1:0] most;
  genvar i;
  generate
    if (SERIAL) begin : planes
      // The greater one shows at the first bit that differs.
      reg [WIDTH-1:0] decided, newer;
      wire [WIDTH-1:0] known = beat == 0 ? {WIDTH{1'b0}} : decided;
      assign most = (known & ((newer & in_data) | (~newer & old))) | (~known & (in_data | old));
      always @(posedge clk)
        if (in_valid) begin
          decided <= known | (in_data ^ old);
          newer <= (known & newer) | (~known & in_data);
        end
    end else begin : words
      for (i = 0; i < WIDTH; i = i + 1) begin : channel
        wire [BITS-1:0] a = in_data[BITS*i +: BITS];
        wire [BITS-1:0] b = old[BITS*i +: BITS];
        assign most[BITS*i +: BITS] = a > b ? a : b;
      end
    end
  endgenerate

  always @(posedge clk) begin
    if (in_valid && used) memory[place] <= most;
    out_data <= most;
    out_valid <= ~rst & in_valid & used & (across == SIDE - 1) & (along == SIDE - 1);
  end
endmodule
